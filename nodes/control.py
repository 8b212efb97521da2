from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.control.config import ControlConfig
from ..sdxl_lora_core.control.control import Control, describe_control
from ..sdxl_lora_core.control.control_net import open_control_net
from . import choices
from .host.folders import cache_folders
from .previews import show
from .widgets import link, widget, widgets
from .wires import CATEGORY, from_image

_FACE = ("strength", "start_percent", "end_percent")
_IMAGE_HELP = (
    "The image that the ControlNet reads, from ComfyUI's Canny or another preprocessor: one for all images, or one for "
    "each. Scaled to cover width x height and cropped to the centre."
)


class AddControlNet:
    """Controls SDXL Generate (cached) by an image of edges, depth, a pose and the like."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Controls the images of SDXL Generate (cached) by an image that a ControlNet reads: edges, depth, a pose. "
        "Several of these nodes in a row make several ControlNets act together."
    )
    SEARCH_ALIASES = ["controlnet", "apply controlnet", "canny", "depth", "openpose", "control net stack"]
    RETURN_TYPES = ("SDXL_CONTROLS", "STRING")
    RETURN_NAMES = ("controls", "info")
    OUTPUT_TOOLTIPS = (
        "The connected ControlNets and this one, for SDXL Generate (cached).",
        "A description of the ControlNet, and when it acts.",
    )
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        control_net_help = "A ControlNet or ControlNet-Union for SDXL: a file or diffusers folder in controlnet."
        return {
            "required": {
                "control_net": choices.combo("control_net", control_net_help),
                "image": link("IMAGE", _IMAGE_HELP),
                **widgets(ControlConfig, _FACE),
            },
            "optional": {
                "controls": link("SDXL_CONTROLS", "ControlNets that act together with this one."),
                "control_type": widget(ControlConfig, "control_type", advanced=True),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, control_net: str | None = None) -> bool | str:
        return choices.check("control_net", control_net)

    @classmethod
    def IS_CHANGED(cls, control_net: str | None = None, **settings: Any) -> str:
        return choices.content("control_net", control_net)

    def add(self, control_net: str, image: Any, controls: Any = None, **settings: Any) -> dict[str, Any]:
        config = ControlConfig(**settings)
        if not config.strength:
            info = f"{control_net} is off"
            return show((controls or (), info), info)
        net = open_control_net(choices.find("control_net", control_net), cache_folders().hashes)
        control = Control(net, tuple(from_image(image)), config)
        return show(((*(controls or ()), control), info := describe_control(control)), info)
