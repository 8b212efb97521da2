"""The picture of a template: what its graph makes with the bundled models."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from tools.run_workflow import Outputs, Workflow

PROMPTS = "a red square on a sky background\na yellow moon on a navy background\na white star on a mint background"
WIDTH, COLUMNS, ROWS = 512, 4, 4  # pixels of the picture, images in a row, rows at most
# What a graph for real SDXL has to change to run with the bundled models.
BUNDLED: dict[str, dict[str, Any]] = {
    "LoadSDXLBase": {"base": "tiny-sdxl (bundled)"},
    "LoadLoRA": {"lora_name": "line_style (bundled)"},
    "LoadCaptionDataset": {"resolution": 128, "validation_percent": 0},
    "DatasetImages": {"size": 128},
    "WatchOptions": {"sample_every": 0, "validate_every": 0, "keep_best": "off"},
    "OptimizerOptions": {"ema_decay": 0.99},
    "TrainSDXLLoRA": {
        "steps": 120,
        "learning_rate": 0.004,
        "batch_size": 4,
        "sample_prompts": "",
        "target_modules": "all-linear+conv",
        "lr_schedule": "cosine",
    },
    "SDXLGenerateCached": {"width": 128, "height": 128},
    "CompareVariant": {"name": "4 steps", "settings": "steps=4"},
    "CompareLoRAs": {"width": 128, "height": 128, "count": 1, "steps": 12, "prompt": PROMPTS},
}
LEFT_OUT = (
    *("CheckpointLoaderSimple", "ApplyLoRAStack", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode"),
    *("Canny", "AddControlNet", "CaptionImages", "LoadSD15Base"),
)


def bundled_twin(workflow: Workflow) -> Workflow:
    """The graph for real SDXL with the bundled models, and with SDXL Generate in place of ComfyUI's own sampling.

    Without ControlNets, of which none is bundled: there, images keep to their start by a lower denoise. Without a
    captioning model and SD 1.5, too: a variant with fewer steps takes the place of that.
    """
    if not is_for_sdxl(workflow):
        return workflow
    own = {
        key: _without_links(_without_controls(node), workflow)
        for key, node in workflow.items()
        if node["class_type"] not in LEFT_OUT
    }
    twin = {
        key: {**node, "inputs": {**node["inputs"], **BUNDLED.get(node["class_type"], {})}} for key, node in own.items()
    }
    for key, node in workflow.items():
        if node["class_type"] == "KSampler":
            twin |= _generated(workflow, key)
            twin[_target(workflow, key)]["inputs"]["images"] = [key, 0]
    return twin


def is_for_sdxl(workflow: Workflow) -> bool:
    return any(str(value).startswith("sd_xl") for node in workflow.values() for value in node["inputs"].values())


def _without_controls(node: dict[str, Any]) -> dict[str, Any]:
    if "controls" not in node["inputs"]:
        return node
    inputs = {name: value for name, value in node["inputs"].items() if name != "controls"}
    return {**node, "inputs": {**inputs, "denoise": 0.75}}


def _without_links(node: dict[str, Any], workflow: Workflow) -> dict[str, Any]:
    """The node without optional links to nodes that have no bundled twin."""
    gone = {key for key, other in workflow.items() if other["class_type"] in ("CaptionImages", "LoadSD15Base")}
    kept = {name: value for name, value in node["inputs"].items() if not (isinstance(value, list) and value[0] in gone)}
    return {**node, "inputs": kept}


def _generated(workflow: Workflow, key: str) -> Workflow:
    """Nodes that make what the KSampler `key` makes."""
    sampler = workflow[key]["inputs"]
    stack = workflow[sampler["model"][0]]["inputs"]["lora_stack"]
    inputs = {
        "base": ["base", 0],
        "prompt": workflow[sampler["positive"][0]]["inputs"]["text"],
        "negative_prompt": workflow[sampler["negative"][0]]["inputs"]["text"],
        **{name: sampler[name] for name in ("seed", "steps", "scheduler")},
        "guidance": sampler["cfg"],
        "sampler": sampler["sampler_name"],
        "count": COLUMNS,
        "cache": "use",
        "lora_stack": stack,
        **BUNDLED["SDXLGenerateCached"],
    }
    base = {"class_type": "LoadSDXLBase", "inputs": {**BUNDLED["LoadSDXLBase"], "precision": "auto"}}
    return {"base": base, key: {"class_type": "SDXLGenerateCached", "inputs": inputs}}


def _target(workflow: Workflow, sampler: str) -> str:
    """The node that shows the images of a KSampler, by the VAE Decode between them."""
    (decoder,) = (key for key, node in workflow.items() if node["inputs"].get("samples") == [sampler, 0])
    (target,) = (key for key, node in workflow.items() if node["inputs"].get("images") == [decoder, 0])
    return target


def thumbnail(workflow: Workflow, outputs: Outputs) -> Image.Image:
    """Rows of four images: of each generator the first of each prompt; of a single one the best first, if scored.

    Above them what they start from, and a loss chart that the graph shows.
    """
    rows = _charts(workflow, outputs)
    for batch in _batches(workflow, outputs):
        rows += [_row(images) for images in batch[: COLUMNS * ROWS].split(COLUMNS)]
    sheet = Image.new("RGB", (WIDTH, sum(row.height for row in rows[:ROWS])))
    top = 0
    for row in rows[:ROWS]:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _batches(workflow: Workflow, outputs: Outputs) -> list[torch.Tensor]:
    generators = {key: node["inputs"] for key, node in workflow.items() if node["class_type"] == "SDXLGenerateCached"}
    scores = [outputs[key] for key, node in workflow.items() if node["class_type"] == "CLIPScore"]
    if not generators:
        return [annotated[0] for *_, annotated, _ in scores]
    starts = [outputs[inputs["image"][0]][0][0] for inputs in generators.values() if "image" in inputs]
    if len(generators) == 1:
        return starts + [(scores or [outputs[key]])[0][0][0] for key in generators]
    return [outputs[key][0][0][:: inputs["count"]] for key, inputs in _without_first(generators)]


def _without_first(generators: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(generators.items(), key=lambda found: "lora_stack" in found[1])


def _charts(workflow: Workflow, outputs: Outputs) -> list[Image.Image]:
    shown = [node["inputs"]["images"] for node in workflow.values() if node["class_type"] == "PreviewImage"]
    charts = [link for link in shown if workflow[link[0]]["class_type"] in ("TrainSDXLLoRA", "CompareLoRAs")]
    return [_row(_upper_square(outputs[key][output][0][:1])) for key, output in charts]


def _upper_square(images: torch.Tensor) -> torch.Tensor:
    """The upper part of a picture that is higher than wide, such as a grid of many prompts."""
    return images[:, : images.shape[2]]


def _row(images: torch.Tensor) -> Image.Image:
    """Up to four images [B, H, W, 3] side by side, WIDTH pixels wide in all."""
    pixels = (torch.cat(list(images), dim=1) * 255).round().to(torch.uint8).numpy()
    side = WIDTH if len(images) == 1 and pixels.shape[1] > WIDTH else WIDTH * len(images) // COLUMNS
    picture = Image.fromarray(pixels).resize(
        (side, pixels.shape[0] * side // pixels.shape[1]), Image.Resampling.LANCZOS
    )
    whole = Image.new("RGB", (WIDTH, picture.height))
    whole.paste(picture, (0, 0))
    return whole
