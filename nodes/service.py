"""What POST /sdxl_lora/generate takes: a request for images as the graph that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ..sdxl_lora_core.generation.config import GenerateConfig
from ..sdxl_lora_core.messages import shown
from ..sdxl_lora_core.sdxl.precision import Precision
from ..sdxl_lora_core.settings import fields_of, from_mapping
from . import choices
from .host.service import GenerateJob
from .wires import read_stack

_OWN = ("base", "precision", "loras", "format", "timeout")
_MOST_IMAGES = 64
_LONGEST = 3600  # s
_OUTPUT = "generate"


def read_job(wanted: Mapping[str, Any]) -> GenerateJob:
    """The job of a request: a `base`, `loras`, the settings of SDXL Generate, `format` and `timeout`.

    Raises ValueError naming the setting, its value and what it may be, FileNotFoundError for a model that is missing.
    """
    settings = {name: value for name, value in wanted.items() if name not in _OWN}
    config = from_mapping(GenerateConfig, {"prompt": "", **settings})
    images = len(config.prompts) * config.count
    form = _one_of("format", wanted.get("format", "png"), ("png", "json"))
    if images > _MOST_IMAGES or (form == "png" and images > 1):
        raise ValueError(
            f"{images} images are requested: set format to json, for at most {_MOST_IMAGES}, or ask for one"
        )
    inputs = {name: getattr(config, name) for name in fields_of(GenerateConfig)}
    graph: dict[str, Any] = {"base": _node("LoadSDXLBase", base=_base(wanted), precision=_precision(wanted))}
    graph |= _loras(wanted.get("loras", []))
    stack = {"lora_stack": [list(graph)[-1], 0]} if len(graph) > 1 else {}
    graph[_OUTPUT] = _node("SDXLGenerateCached", base=["base", 0], **inputs, **stack)
    return GenerateJob(graph, _OUTPUT, form, _timeout(wanted.get("timeout", 300)))


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _base(wanted: Mapping[str, Any]) -> str:
    if "base" not in wanted:
        raise ValueError(f"base is missing: give the name of one, such as {', '.join(choices.names('base')[:5])}")
    choices.find("base", wanted["base"])
    return wanted["base"]


def _precision(wanted: Mapping[str, Any]) -> str:
    return _one_of("precision", wanted.get("precision", "auto"), get_args(Precision))


def _loras(stack: Any) -> dict[str, Any]:
    """Load LoRA nodes in a row."""
    if not isinstance(stack, list):
        raise ValueError(f"loras is {shown(stack)}: give a list of objects with name and strength_model")
    nodes: dict[str, Any] = {}
    for number, (name, model, clip) in enumerate(read_stack(stack)):
        choices.find("lora", name)
        before = {"lora_stack": [f"lora {number - 1}", 0]} if number else {}
        values = {"lora_name": name, "strength_model": model, "strength_clip": clip, "enabled": True}
        nodes[f"lora {number}"] = _node("LoadLoRA", **values, **before)
    return nodes


def _timeout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _LONGEST:
        raise ValueError(f"timeout is {shown(value)}: give seconds, from 1 to {_LONGEST}")
    return float(value)


def _one_of(option: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{option} is {shown(value)}: choose one of {', '.join(allowed)}")
    return value
