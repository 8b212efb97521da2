from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.sdxl.base import describe_base, open_base, quick_fingerprint
from ..sdxl_lora_core.sdxl.precision import PRECISIONS
from ..sdxl_lora_core.sdxl.vae_override import with_vae
from ..sdxl_lora_core.training.config.train_config import TrainConfig
from . import choices
from .host.folders import cache_folder
from .previews import show
from .widgets import train_widget, widget
from .wires import CATEGORY

OWN_VAE = "(the base's own)"


class LoadSDXLBase:
    """Opens an SDXL checkpoint or diffusers folder."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Opens an SDXL base model: a single .safetensors checkpoint or a diffusers folder. Only its headers are read "
        "here; weights are loaded by the nodes that need them, part by part."
    )
    SEARCH_ALIASES = ["sdxl checkpoint", "load base model", "diffusers model", "checkpoint loader"]
    RETURN_TYPES = ("SDXL_BASE", "STRING")
    RETURN_NAMES = ("base", "info")
    OUTPUT_TOOLTIPS = (
        "The base model, for training and generating.",
        "What the model is: layout, prediction type, precision, fingerprint.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": (
                    choices.names("base"),
                    {"tooltip": "An SDXL checkpoint, a diffusers folder, or the bundled tiny model to try things out."},
                ),
                "precision": widget(
                    TrainConfig,
                    "precision",
                    PRECISIONS,
                    "Number format of the weights in memory. auto: bf16 or fp16 on a GPU, fp32 on the CPU.",
                ),
            },
            "optional": {
                "prediction": train_widget("prediction", advanced=True),
                "zero_terminal_snr": train_widget("zero_terminal_snr", advanced=True),
                "vae": (
                    [OWN_VAE, *choices.names("vae")],
                    {
                        "default": OWN_VAE,
                        "advanced": True,
                        "tooltip": "Another VAE than the base's, from the vae folder, for training and generating. It "
                        "has to be one for SDXL: that of Stable Diffusion 1.5 looks alike in a file, and gives wrong "
                        "colours.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, base: str | None = None, vae: str | None = None) -> bool | str:
        found = choices.check("base", base)
        return choices.check("vae", _chosen(vae)) if found is True else found

    @classmethod
    def IS_CHANGED(cls, base: str | None = None, vae: str | None = None, **settings: Any) -> str:
        found = choices.content("base", base, quick_fingerprint)
        return found + choices.content("vae", _chosen(vae), quick_fingerprint)

    def load(
        self, base: str, precision: Any, prediction: Any = "auto", zero_terminal_snr: Any = "auto", vae: str = OWN_VAE
    ) -> dict[str, Any]:
        hashes = cache_folder() / "hashes"
        opened = open_base(
            choices.find("base", base), precision, hashes, prediction=prediction, zero_terminal_snr=zero_terminal_snr
        )
        if zero_terminal_snr == "on" and opened.prediction_type == "epsilon":
            raise ValueError(
                f"zero_terminal_snr is 'on' and prediction is {prediction!r}, so {opened.name} would predict epsilon "
                "where there is only noise: set prediction to v_prediction, or zero_terminal_snr to auto"
            )
        if vae != OWN_VAE:
            opened = with_vae(opened, choices.find("vae", vae), hashes)
        info = describe_base(opened)
        return show((opened, info), info)


def _chosen(vae: str | None) -> str | None:
    return None if vae == OWN_VAE else vae
