from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.base_model import describe_base, open_base, quick_fingerprint
from ..sdxl_lora_core.config import PRECISIONS, TrainConfig
from . import folders, host
from .previews import show
from .wires import CATEGORY, train_widget, widget


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
                    folders.names("base"),
                    {"tooltip": "An SDXL checkpoint, a diffusers folder, or the bundled tiny model to try things out."},
                ),
                "precision": widget(
                    TrainConfig, "precision", PRECISIONS,
                    "Number format of the weights in memory. auto: bf16 or fp16 on a GPU, fp32 on the CPU.",
                ),
            },
            "optional": {
                "prediction": train_widget("prediction", advanced=True),
                "zero_terminal_snr": train_widget("zero_terminal_snr", advanced=True),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, base: str | None = None) -> bool | str:
        return folders.check("base", base)

    @classmethod
    def IS_CHANGED(cls, base: str | None = None, **settings: Any) -> str:
        return folders.content("base", base, quick_fingerprint)

    def load(
        self, base: str, precision: Any, prediction: Any = "auto", zero_terminal_snr: Any = "auto"
    ) -> dict[str, Any]:
        opened = open_base(
            folders.find("base", base), precision, host.cache_folder() / "hashes",
            prediction=prediction, zero_terminal_snr=zero_terminal_snr,
        )  # fmt: skip
        if zero_terminal_snr == "on" and opened.prediction_type == "epsilon":
            raise ValueError(
                f"zero_terminal_snr is 'on' and prediction is {prediction!r}, so {opened.name} would predict epsilon "
                "where there is only noise: set prediction to v_prediction, or zero_terminal_snr to auto"
            )
        info = describe_base(opened)
        return show((opened, info), info)
