"""The texts in a generated PNG: how it was made, and the mark of generated media."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..images.png import AI_GENERATED, LONGEST_TEXT, XMP

if TYPE_CHECKING:
    from ..control.control import Control
    from ..lora.stack import StackEntry
    from ..sdxl.base import SDXLBase
    from ..text.embedding_files import EmbeddingFile
    from .config import GenerateConfig
from .guidance import uses_negative_prompt

_SHORT_HASH = 10  # AutoV2 of Civitai and A1111: the first digits of the file's SHA-256
_SAMPLERS = {
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
_SCHEDULES = {"sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM"}


def graph_texts(graph: Mapping[str, Any]) -> dict[str, str]:
    """ComfyUI's `prompt` and `workflow` as it writes them, but without local paths."""
    texts = {name: json.dumps(without_paths(value)) for name, value in graph.items() if value}
    return {name: text for name, text in texts.items() if len(text) <= LONGEST_TEXT}


@dataclass(frozen=True)
class PngTexts:
    """The texts of a request's PNGs. `config` is the request as the user made it, `graph` as graph_texts returns it."""

    base: SDXLBase
    config: GenerateConfig
    stack: Sequence[StackEntry] = ()
    graph: Mapping[str, str] | None = None
    controls: Sequence[Control] = ()

    def of_image(self, prompt: str, seed: int, embeddings: Sequence[EmbeddingFile] = ()) -> dict[str, str]:
        """The texts of one image by keyword: the mark of generated media and, with a graph, how it was made."""
        if self.graph is None:
            return {XMP: AI_GENERATED}
        return {"parameters": self.parameters(prompt, seed, embeddings), **self.graph, XMP: AI_GENERATED}

    def parameters(self, prompt: str, seed: int, embeddings: Sequence[EmbeddingFile] = ()) -> str:
        """A1111's text, as Civitai reads it, with the hashes by which it finds models, LoRAs and embeddings."""
        loras = {_plain_name(entry.ref.name): entry for entry in self.stack}
        lines = [" ".join([prompt, *(f"<lora:{name}:{_strengths(entry)}>" for name, entry in loras.items())])]
        if self.config.negative_prompt and uses_negative_prompt(self.base, self.config):
            lines.append(f"Negative prompt: {self.config.negative_prompt}")
        hashes = {f"lora:{name}": entry.sha256[:_SHORT_HASH] for name, entry in loras.items()}
        hashes |= {f"embed:{_plain_name(file.name)}": file.sha256[:_SHORT_HASH] for file in embeddings}
        facts = self._facts(seed, hashes)
        return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])

    def _facts(self, seed: int, hashes: Mapping[str, str]) -> dict[str, Any]:
        config, base = self.config, self.base
        if base.layout == "single_file":  # a folder has no hash that others would know
            hashes = {"model": dict(base.part_hashes)["unet"][:_SHORT_HASH], **hashes}
        return {
            "Steps": config.steps,
            "Sampler": _SAMPLERS.get(config.sampler, config.sampler),
            "Schedule type": _SCHEDULES.get(config.scheduler, config.scheduler.title()),
            "CFG scale": f"{config.guidance:g}",
            "Seed": seed,
            "Size": f"{config.width}x{config.height}",
            **({"Model hash": hashes["model"]} if "model" in hashes else {}),
            "Model": _quoted(_plain_name(base.name)),
            **({"Denoising strength": f"{config.denoise:g}"} if config.denoise < 1 else {}),
            **_second_pass(config),
            **{f"ControlNet {number}": json.dumps(_control(one)) for number, one in enumerate(self.controls)},
            **({"Hashes": json.dumps(hashes)} if hashes else {}),
        }


def _second_pass(config: GenerateConfig) -> dict[str, Any]:
    if config.hires_scale == 1:
        return {}
    return {
        "Denoising strength": f"{config.hires_denoise:g}",  # A1111 writes that of the second pass
        "Hires upscale": f"{config.hires_scale:g}",
        "Hires steps": config.hires_steps or config.steps,
        "Hires upscaler": "Lanczos",
    }


def without_paths(value: Any) -> Any:
    """The value with each absolute path reduced to its last component.

    Relative paths are kept: they name a model or an image within ComfyUI's folders.
    """
    if isinstance(value, str):
        return "\n".join(map(_without_paths, value.split("\n")))
    if isinstance(value, Mapping):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, Sequence):
        return [without_paths(inner) for inner in value]
    return value


_ROOT = r"(?:file://|~[\\/]|[A-Za-z]:[\\/]|\\\\|/(?=[^\s/\\]))"
_WHOLE = re.compile(rf'\s*["\']?{_ROOT}.*')
_WITHIN = re.compile(rf"(?<![\w.:/\\~-]){_ROOT}(?:[^\s\\/\"'<>|]+[\\/])+")
_LONGEST_PATH = 4096  # longer lines are data, such as an image in base64


def _without_paths(line: str) -> str:
    if len(line) > _LONGEST_PATH:
        return line
    if _WHOLE.fullmatch(line):
        return re.split(r"[\\/]", line.rstrip("\\/\"' "))[-1]
    return _WITHIN.sub("", line)


def _plain_name(name: str) -> str:
    return re.split(r"[\\/]", name)[-1].removesuffix(".safetensors").removesuffix(".sft")


def _strengths(entry: StackEntry) -> str:
    """One strength for both, or that of the text encoders and that of the UNet."""
    model, clip = entry.ref.strength_model, entry.ref.strength_clip
    return f"{model:g}" if model == clip else f"{clip:g}:{model:g}"


def _control(control: Control) -> str:
    """The text of a ControlNet, as A1111's extension writes it."""
    config = control.config
    facts = {
        "Module": "none",
        "Model": f"{control.net.name} [{control.net.sha256[:_SHORT_HASH]}]",
        **({} if config.control_type == "auto" else {"Control Type": config.control_type}),
        "Weight": f"{config.strength:g}",
        "Resize Mode": "Crop and Resize",
        "Guidance Start": f"{config.start_percent:g}",
        "Guidance End": f"{config.end_percent:g}",
        "Control Mode": "Balanced",
    }
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
