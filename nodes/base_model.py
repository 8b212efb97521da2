from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.sdxl.base import describe_base, open_base, require_predictable, require_vae
from ..sdxl_lora_core.sdxl.vae_override import with_vae
from ..sdxl_lora_core.training.config.train_config import TrainConfig
from . import choices
from .host.folders import cache_folders
from .previews import show
from .widgets import widget, widgets
from .wires import CATEGORY

OWN_VAE = "(the base's own)"
_VAE_HELP = (
    "A VAE from the vae folder to use instead of the base's own, for training and generating. It must be for SDXL: one "
    "for Stable Diffusion 1.5 has the same layout and gives wrong colours."
)


class LoadSDXLBase:
    """Opens an SDXL checkpoint or diffusers folder."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Opens an SDXL base model: a single .safetensors checkpoint or a diffusers folder. Only its headers are read "
        "here; weights are loaded by the nodes that need them, part by part."
    )
    SEARCH_ALIASES = [
        "sdxl checkpoint",
        "load base model",
        "diffusers model",
        "checkpoint loader",
        "tiny model",
        "small model",
    ]
    RETURN_TYPES = ("SDXL_BASE", "STRING")
    RETURN_NAMES = ("base", "info")
    OUTPUT_TOOLTIPS = (
        "The base model, for training and generating.",
        "A description of the model: layout, prediction type, precision, fingerprint.",
    )
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        precision_help = "Precision of the weights in memory. auto: bf16 or fp16 on a GPU, fp32 on the CPU."
        return {
            "required": {
                "base": choices.combo("base", "An SDXL checkpoint, a diffusers folder, or the bundled tiny model."),
                "precision": widget(TrainConfig, "precision", tooltip=precision_help),
            },
            "optional": {
                **widgets(TrainConfig, ("prediction", "zero_terminal_snr"), advanced=True),
                "vae": choices.combo("vae", _VAE_HELP, first=OWN_VAE, advanced=True),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, base: str | None = None, vae: str | None = None) -> bool | str:
        found = choices.check("base", base)
        return choices.check("vae", _chosen(vae)) if found is True else found

    @classmethod
    def IS_CHANGED(cls, base: str | None = None, vae: str | None = None, **settings: Any) -> str:
        found = choices.content("base", base)
        return found + choices.content("vae", _chosen(vae))

    def load(
        self, base: str, precision: Any, prediction: Any = "auto", zero_terminal_snr: Any = "auto", vae: str = OWN_VAE
    ) -> dict[str, Any]:
        hashes = cache_folders().hashes
        stated = {"prediction": prediction, "zero_terminal_snr": zero_terminal_snr}
        opened = open_base(choices.find("base", base), precision, hashes, **stated)
        if zero_terminal_snr == "on":
            require_predictable(opened)
        if vae != OWN_VAE:
            opened = with_vae(opened, choices.find("vae", vae), hashes)
        require_vae(opened)
        info = describe_base(opened)
        return show((opened, info), info)


def _chosen(vae: str | None) -> str | None:
    return None if vae == OWN_VAE else vae
