from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ..sdxl_lora_core.sdxl.base import (
    SDXLBase,
    describe_base,
    open_base,
    open_sd15_base,
    require_predictable,
    require_vae,
)
from ..sdxl_lora_core.sdxl.vae_override import with_vae
from ..sdxl_lora_core.training.config.train_config import TrainConfig
from . import choices
from .host.folders import cache_folders
from .previews import show
from .widgets import widget, widgets
from .wires import CATEGORY

OWN_VAE = "(the base's own)"
_PRECISION_HELP = "Precision of the weights in memory. auto: bf16 or fp16 on a GPU, fp32 on the CPU."
_SD15_VAE_HELP = (
    "A VAE from the vae folder to use instead of the base's own. It must be for Stable Diffusion 1.5: SDXL's has the "
    "same layout and gives wrong colours."
)
_VAE_HELP = (
    "A VAE from the vae folder to use instead of the base's own, for training and generating. It must be for SDXL: one "
    "for Stable Diffusion 1.5 has the same layout and gives wrong colours."
)


class _LoadBase:
    """What the loaders of all families have in common: KIND names the models, OPEN opens one."""

    KIND: ClassVar[choices.Kind]
    OPEN: ClassVar[Callable[..., SDXLBase]]
    BASE_HELP: ClassVar[str]
    VAE_HELP: ClassVar[str]

    CATEGORY = CATEGORY
    RETURN_TYPES = ("SDXL_BASE", "STRING")
    RETURN_NAMES = ("base", "info")
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": choices.combo(cls.KIND, cls.BASE_HELP),
                "precision": widget(TrainConfig, "precision", tooltip=_PRECISION_HELP),
            },
            "optional": {
                **widgets(TrainConfig, ("prediction", "zero_terminal_snr"), advanced=True),
                "vae": choices.combo("vae", cls.VAE_HELP, first=OWN_VAE, advanced=True),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, base: str | None = None, vae: str | None = None) -> bool | str:
        found = choices.check(cls.KIND, base)
        return choices.check("vae", _chosen(vae)) if found is True else found

    @classmethod
    def IS_CHANGED(cls, base: str | None = None, vae: str | None = None, **settings: Any) -> str:
        return choices.content(cls.KIND, base) + choices.content("vae", _chosen(vae))

    def load(
        self, base: str, precision: Any, prediction: Any = "auto", zero_terminal_snr: Any = "auto", vae: str = OWN_VAE
    ) -> dict[str, Any]:
        hashes = cache_folders().hashes
        stated = {"prediction": prediction, "zero_terminal_snr": zero_terminal_snr}
        opened = type(self).OPEN(choices.find(self.KIND, base), precision, hashes, **stated)
        if zero_terminal_snr == "on":
            require_predictable(opened)
        if vae != OWN_VAE:
            opened = with_vae(opened, choices.find("vae", vae), hashes)
        require_vae(opened)
        info = describe_base(opened)
        return show((opened, info), info)


class LoadSDXLBase(_LoadBase):
    """Opens an SDXL checkpoint or diffusers folder."""

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
    OUTPUT_TOOLTIPS = (
        "The base model, for training and generating.",
        "A description of the model: layout, prediction type, precision, fingerprint.",
    )
    KIND = "base"
    OPEN = staticmethod(open_base)
    BASE_HELP = "An SDXL checkpoint, a diffusers folder, or the bundled tiny model."
    VAE_HELP = _VAE_HELP


class LoadSD15Base(_LoadBase):
    """Opens a Stable Diffusion 1.5 checkpoint or diffusers folder, to compare SDXL with."""

    DESCRIPTION = (
        "Opens a Stable Diffusion 1.5 base model for generating, to compare SDXL with: connect it to SDXL Generate "
        "(cached) or to Compare: Add Variant. LoRAs, ControlNets and training need an SDXL base."
    )
    SEARCH_ALIASES = ["sd15", "sd 1.5 checkpoint", "stable diffusion 1.5", "load sd1.5", "v1-5"]
    OUTPUT_TOOLTIPS = (
        "The base model, for generating only.",
        "A description of the model: layout, prediction type, precision, fingerprint.",
    )
    KIND = "sd15_base"
    OPEN = staticmethod(open_sd15_base)
    BASE_HELP = "A Stable Diffusion 1.5 checkpoint or diffusers folder."
    VAE_HELP = _SD15_VAE_HELP


def _chosen(vae: str | None) -> str | None:
    return None if vae == OWN_VAE else vae
