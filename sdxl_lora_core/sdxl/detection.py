"""Detects SDXL by a checkpoint's header or a diffusers folder's settings, and rejects other models by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..messages import brief, shown
from ..safetensors_file import WeightsHeader
from .file_kinds import UNET, VAE, kind_of, require_unscaled

PredictionType = Literal["epsilon", "v_prediction"]

WANTED = "use an SDXL base: a single-file checkpoint (.safetensors) or a diffusers folder with model_index.json"
PIPELINE = "StableDiffusionXLPipeline"
# Pipelines of the same four parts: plain, Img2Img, ControlNet, PAG and others.
_PIPELINES = re.compile(r"StableDiffusionXL\w*Pipeline")
PART_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_PREDICTIONS: dict[str, PredictionType] = {
    **dict.fromkeys(("epsilon", "eps", "e"), "epsilon"),
    **dict.fromkeys(("v_prediction", "v_pred", "vpred", "v"), "v_prediction"),
}
_CHANNELS = {8: "an image-editing model", 9: "an inpainting model"}
_TIME_IDS = 6  # original height and width, crop top and left, target height and width


class Prediction(NamedTuple):
    """The prediction type of the UNet, and whether its noise schedule has zero terminal SNR."""

    type: PredictionType
    zero_terminal_snr: bool


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; NaN and Infinity, which some programs write, become None.

    Raises FileNotFoundError or ValueError naming the file.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} is missing: the model folder is incomplete, download it again") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({brief(error)}): download the model again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object: download the model again")
    return values


def require_checkpoint(header: WeightsHeader, configs: Path, override: str = "auto") -> Prediction:
    """The prediction of a checkpoint. Raises ValueError unless it is SDXL of the size in `configs`.

    Its VAE may be missing (see has_vae), and an unknown prediction type does not matter if `override` gives one.
    """
    name, kind = header.path.name, kind_of(header)
    if not kind.startswith("an SDXL checkpoint"):
        raise ValueError(f"{name} is {kind}: {WANTED}")
    if "edm_mean" in header.shapes or "edm_vpred.sigma_max" in header.shapes:
        raise ValueError(f"{name} is an SDXL variant with an EDM schedule, such as Playground v2.5: {WANTED}")
    require_unscaled(header)
    unet = read_json(configs / "unet" / "config.json")
    _require_channels(name, _shape(header, "input_blocks.0.0.weight"))
    own = [tensor for tensor in header.shapes if tensor.startswith(UNET)]
    blocks = sum(re.search(r"transformer_blocks\.\d+\.norm1\.weight$", tensor) is not None for tensor in own)
    if blocks != transformer_blocks(unet):
        raise ValueError(
            f"{name} has {blocks} transformer blocks where SDXL has {transformer_blocks(unet)},"
            f" as SSD-1B and other pruned models have: {WANTED}"
        )
    width = _shape(header, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if width[1] != unet["cross_attention_dim"]:
        raise ValueError(
            f"{name} takes text of width {width[1]} where SDXL takes {unet['cross_attention_dim']}: {WANTED}"
        )
    return _prediction_in(header, override)


def has_vae(header: WeightsHeader) -> bool:
    """Whether a checkpoint has both halves of a VAE."""
    return header.has(f"{VAE}encoder.", f"{VAE}decoder.")


def require_folder(folder: Path, override: str = "auto") -> Prediction:
    """As require_checkpoint, for a diffusers folder of SDXL, whatever its size."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"folder {folder.name} has no model_index.json: {WANTED}")
    try:
        return _folders_prediction(folder, override)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"folder {folder.name} has settings that are not those of SDXL ({type(error).__name__}: {brief(error)}): "
            "download the model again"
        ) from error


def _folders_prediction(folder: Path, override: str) -> Prediction:
    _require_pipeline(folder.name, read_json(folder / "model_index.json"))
    unet, vae, text, text_2 = (read_json(folder / part / "config.json") for part in PART_CLASSES)
    if not isinstance(unet["in_channels"], int):
        raise TypeError(f"in_channels is {shown(unet['in_channels'])}")
    _require_channels(folder.name, (0, unet["in_channels"]))
    text_width = text["hidden_size"] + text_2["hidden_size"]
    time_width = text_2["projection_dim"] + _TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
    found = unet["cross_attention_dim"], unet.get("projection_class_embeddings_input_dim")
    if unet.get("addition_embed_type") != "text_time" or found != (text_width, time_width):
        raise ValueError(
            f"folder {folder.name}: the UNet takes text of width {found[0]} and added input of width {found[1]}, but"
            f" the text encoders give {text_width} and {time_width}, so they belong to different models: {WANTED}"
        )
    if vae.get("latents_mean") is not None:
        raise ValueError(f"folder {folder.name} has a VAE with latents_mean, as Playground v2.5: {WANTED}")
    return _prediction_of_scheduler(folder, override)


def _require_pipeline(name: str, index: Mapping[str, Any]) -> None:
    if not _PIPELINES.fullmatch(str(index.get("_class_name"))):
        raise ValueError(f"folder {name} is a {index.get('_class_name')} and not a {PIPELINE}: {WANTED}")
    for part, wanted in PART_CLASSES.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != wanted:
            raise ValueError(f"folder {name} has {found or 'nothing'} as its {part}, not {wanted}: {WANTED}")


def _require_channels(name: str, shape: tuple[int, ...]) -> None:
    if shape[1] != 4:
        kind = _CHANNELS.get(shape[1], "another kind of model")
        raise ValueError(f"{name} has a UNet with {shape[1]} input channels, so it is {kind}: {WANTED} (4 channels)")


def _shape(header: WeightsHeader, tensor: str) -> tuple[int, ...]:
    shape = header.shapes.get(UNET + tensor, ())
    if len(shape) < 2:
        raise ValueError(f"{header.path.name} lacks the tensor {UNET}{tensor}: {WANTED}")
    return shape


def transformer_blocks(unet: Mapping[str, Any]) -> int:
    """The number in the whole UNet: the depth of each stage times its attentions in the down and up blocks."""
    depths, layers = unet["transformer_layers_per_block"], unet["layers_per_block"]
    stages = sum(
        depth * (layers + layers + 1)
        for depth, kind in zip(depths, unet["down_block_types"], strict=True)
        if kind.startswith("CrossAttn")
    )
    return stages + depths[-1]


def _prediction_in(header: WeightsHeader, override: str) -> Prediction:
    """From the marker tensors `v_pred` and `ztsnr` that trainers write, else from the ModelSpec metadata."""
    if "v_pred" in header.shapes:
        return Prediction("v_prediction", "ztsnr" in header.shapes)
    # ztsnr alone does not say that the base was trained so, and with epsilon the first step would be undefined.
    stated = header.metadata.get("modelspec.prediction_type", "").strip() or "epsilon"
    return Prediction(_known(header.path.name, stated, override), False)


def _prediction_of_scheduler(folder: Path, override: str) -> Prediction:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if str(scheduler.get("_class_name", "")).startswith("EDM"):
        raise ValueError(f"folder {folder.name} has an EDM schedule, such as Playground v2.5: {WANTED}")
    prediction = _known(f"folder {folder.name}", str(scheduler.get("prediction_type") or "epsilon"), override)
    return Prediction(prediction, bool(scheduler.get("rescale_betas_zero_snr", False)))


def _known(where: str, prediction: str, override: str) -> PredictionType:
    known = _PREDICTIONS.get(prediction.casefold().replace("-", "_"))
    if known is None and override == "auto":
        raise ValueError(
            f"{where} has prediction type {shown(prediction)}: only epsilon and v_prediction are supported; set "
            "prediction to the one that the base was trained with"
        )
    return known or "epsilon"
