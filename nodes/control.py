from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.control.config import CONTROL_TYPES, ControlConfig
from ..sdxl_lora_core.control.control import Control
from ..sdxl_lora_core.control.control_net import describe_control_net, open_control_net
from . import choices
from .host.folders import cache_folder
from .previews import show
from .widgets import widget
from .wires import CATEGORY, from_image


class AddControlNet:
    """Steers SDXL Generate (cached) by a picture of edges, depth, a pose and the like."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Steers the images of SDXL Generate (cached) by a picture that a ControlNet reads: edges, depth, a pose. "
        "Several of these nodes in a row let several ControlNets act together."
    )
    SEARCH_ALIASES = ["controlnet", "apply controlnet", "canny", "depth", "openpose", "control net stack"]
    RETURN_TYPES = ("SDXL_CONTROLS", "STRING")
    RETURN_NAMES = ("controls", "info")
    OUTPUT_TOOLTIPS = (
        "The incoming ControlNets and this one, for SDXL Generate (cached).",
        "What the ControlNet is, and when it acts.",
    )
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "control_net": (
                    choices.names("control_net"),
                    {"tooltip": "A ControlNet or ControlNet-Union for SDXL: a file or diffusers folder in controlnet."},
                ),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "What the ControlNet reads, as core's Canny and other preprocessors give it: one "
                        "for all images, or one for each. Scaled to cover width x height and cut in the middle.",
                    },
                ),
                "strength": widget(
                    ControlConfig,
                    "strength",
                    "FLOAT",
                    "How strongly it steers. 0 turns it off, at no cost.",
                    min=0.0,
                    max=10.0,
                    step=0.01,
                ),
                "start_percent": widget(
                    ControlConfig,
                    "start_percent",
                    "FLOAT",
                    "It acts from this share of the way from noise to image on, as in ComfyUI's Apply ControlNet.",
                    min=0.0,
                    max=1.0,
                    step=0.001,
                ),
                "end_percent": widget(
                    ControlConfig,
                    "end_percent",
                    "FLOAT",
                    "It acts up to this share of the way. 0.5 or so lets the details free and saves time.",
                    min=0.0,
                    max=1.0,
                    step=0.001,
                ),
            },
            "optional": {
                "controls": ("SDXL_CONTROLS", {"tooltip": "ControlNets that act together with this one."}),
                "control_type": widget(
                    ControlConfig,
                    "control_type",
                    CONTROL_TYPES,
                    "What the image shows, for a ControlNet-Union, which reads several kinds. auto: for all others.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, control_net: str | None = None) -> bool | str:
        return choices.check("control_net", control_net)

    @classmethod
    def IS_CHANGED(cls, control_net: str | None = None, **settings: Any) -> str:
        return choices.content("control_net", control_net, choices.stamp)

    def add(
        self, control_net: str, image: Any, controls: tuple[Control, ...] | None = None, **settings: Any
    ) -> dict[str, Any]:
        config = ControlConfig(**settings)
        if not config.strength:
            info = f"{control_net} is off"
            return show((controls or (), info), info)
        net = open_control_net(choices.find("control_net", control_net), cache_folder() / "hashes")
        control = Control(net, tuple(from_image(image)), config)
        info = "\n".join([describe_control_net(net), _acts(control)])
        return show(((*(controls or ()), control), info), info)


def _acts(control: Control) -> str:
    config, pictures = control.config, len(control.hints)
    height, width = control.hints[0].shape[:2]
    return (
        f"strength {config.strength:g} from {config.start_percent:.0%} to {config.end_percent:.0%} of the way, by "
        f"{pictures} image{'s' * (pictures != 1)} of {width}x{height}"
    )
