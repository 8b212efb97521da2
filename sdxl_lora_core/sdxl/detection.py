"""Detects the models of a family by a checkpoint's header or a diffusers folder's settings.

Other models are rejected by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..messages import brief, shown
from ..safetensors_file import WeightsHeader
from .family import SDXL, Family, Part
from .file_kinds import UNET, VAE, kind_of, require_unscaled

PredictionType = Literal["epsilon", "v_prediction"]

PART_CLASSES: dict[Part, str] = {
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
_SD2_TEXT = 1024  # the width of Stable Diffusion 2's text embeddings
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


def has_vae(header: WeightsHeader) -> bool:
    """Whether a checkpoint has both halves of a VAE."""
    return header.has(f"{VAE}encoder.", f"{VAE}decoder.")


@dataclass(frozen=True)
class Detector:
    """Finds the prediction type of models of a family, and rejects all others.

    `override` is the user's prediction type, "auto" for none: with one it does not matter that a model's is unknown.
    """

    family: Family = SDXL
    override: str = "auto"

    def of_checkpoint(self, header: WeightsHeader, configs: Path) -> Prediction:
        """The prediction of a checkpoint. Raises ValueError unless it is of the family, and of the size in `configs`.

        Its VAE may be missing (see has_vae).
        """
        name, kind, wanted, title = header.path.name, kind_of(header), self.family.wanted, self.family.title
        if not (kind.startswith(self.family.checkpoint) and header.has(UNET)):
            raise ValueError(f"{name} is {kind}: {wanted}")
        if "edm_mean" in header.shapes or "edm_vpred.sigma_max" in header.shapes:
            raise ValueError(f"{name} is an SDXL variant with an EDM schedule, such as Playground v2.5: {wanted}")
        require_unscaled(header)
        unet = read_json(configs / "unet" / "config.json")
        self._require_channels(name, self._shape(header, "input_blocks.0.0.weight"))
        own = [tensor for tensor in header.shapes if tensor.startswith(UNET)]
        blocks = sum(re.search(r"transformer_blocks\.\d+\.norm1\.weight$", tensor) is not None for tensor in own)
        if blocks != transformer_blocks(unet):
            raise ValueError(
                f"{name} has {blocks} transformer blocks where {title} has {transformer_blocks(unet)},"
                f" as SSD-1B and other pruned models have: {wanted}"
            )
        width = self._shape(header, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
        if width[1] != unet["cross_attention_dim"]:
            raise ValueError(
                f"{name} takes text of width {width[1]} where {title} takes {unet['cross_attention_dim']}: {wanted}"
            )
        return _prediction_in(header, self.override)

    def of_folder(self, folder: Path) -> Prediction:
        """As of_checkpoint, for a diffusers folder, whatever its size."""
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"folder {folder.name} has no model_index.json: {self.family.wanted}")
        try:
            return self._of_settings(folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"folder {folder.name} has settings that are not those of {self.family.title} "
                f"({type(error).__name__}: {brief(error)}): download the model again"
            ) from error

    def _of_settings(self, folder: Path) -> Prediction:
        wanted = self.family.wanted
        self._require_pipeline(folder.name, read_json(folder / "model_index.json"))
        settings: dict[Part, dict[str, Any]] = {
            part: read_json(folder / part / "config.json") for part in self.family.parts
        }
        channels = settings["unet"]["in_channels"]
        if not isinstance(channels, int):
            raise TypeError(f"in_channels is {shown(channels)}")
        self._require_channels(folder.name, (0, channels))
        found, given = (_sdxl_widths if self.family.is_sdxl else _sd15_widths)(settings)
        if found != given:
            raise ValueError(
                f"folder {folder.name}: the UNet takes text of width {found[0]} and added input of width {found[1]}, "
                f"but the text encoders give {given[0]} and {given[1]}, so they belong to different models: {wanted}"
            )
        if not self.family.is_sdxl and found[0] == _SD2_TEXT:
            raise ValueError(f"folder {folder.name} is a Stable Diffusion 2.x model: {wanted}")
        if settings["vae"].get("latents_mean") is not None:
            raise ValueError(f"folder {folder.name} has a VAE with latents_mean, as Playground v2.5: {wanted}")
        return self._of_scheduler(folder)

    def _of_scheduler(self, folder: Path) -> Prediction:
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        if str(scheduler.get("_class_name", "")).startswith("EDM"):
            raise ValueError(f"folder {folder.name} has an EDM schedule, such as Playground v2.5: {self.family.wanted}")
        stated = str(scheduler.get("prediction_type") or "epsilon")
        prediction = _known(f"folder {folder.name}", stated, self.override)
        return Prediction(prediction, bool(scheduler.get("rescale_betas_zero_snr", False)))

    def _require_pipeline(self, name: str, index: Mapping[str, Any]) -> None:
        family = self.family
        if not family.has_pipeline(str(index.get("_class_name"))):
            kind = index.get("_class_name")
            raise ValueError(f"folder {name} is a {kind} and not a {family.pipeline}: {family.wanted}")
        for part in family.parts:
            entry, wanted = index.get(part), PART_CLASSES[part]
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if found != wanted:
                raise ValueError(f"folder {name} has {found or 'nothing'} as its {part}, not {wanted}: {family.wanted}")

    def _require_channels(self, name: str, shape: tuple[int, ...]) -> None:
        if shape[1] != 4:
            kind, wanted = _CHANNELS.get(shape[1], "another kind of model"), self.family.wanted
            raise ValueError(
                f"{name} has a UNet with {shape[1]} input channels, so it is {kind}: {wanted} (4 channels)"
            )

    def _shape(self, header: WeightsHeader, tensor: str) -> tuple[int, ...]:
        shape = header.shapes.get(UNET + tensor, ())
        if len(shape) < 2:
            raise ValueError(f"{header.path.name} lacks the tensor {UNET}{tensor}: {self.family.wanted}")
        return shape


Widths = tuple[Any, Any]  # of the text, and of the added input


def _sdxl_widths(settings: Mapping[Part, dict[str, Any]]) -> tuple[Widths, Widths]:
    """The widths that the UNet takes, and those that the text encoders give."""
    unet, text, text_2 = settings["unet"], settings["text_encoder"], settings["text_encoder_2"]
    text_width = text["hidden_size"] + text_2["hidden_size"]
    added = text_2["projection_dim"] + _TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
    takes_added = unet.get("addition_embed_type") == "text_time"
    taken = unet.get("projection_class_embeddings_input_dim") if takes_added else None
    return (unet["cross_attention_dim"], taken), (text_width, added)


def _sd15_widths(settings: Mapping[Part, dict[str, Any]]) -> tuple[Widths, Widths]:
    unet = settings["unet"]
    return (unet["cross_attention_dim"], unet.get("addition_embed_type")), (
        settings["text_encoder"]["hidden_size"],
        None,
    )


def transformer_blocks(unet: Mapping[str, Any]) -> int:
    """The number in the whole UNet: the depth of each stage times its attentions in the down and up blocks."""
    depths, layers = unet["transformer_layers_per_block"], unet["layers_per_block"]
    if isinstance(depths, int):
        depths = [depths] * len(unet["down_block_types"])
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


def _known(where: str, prediction: str, override: str) -> PredictionType:
    known = _PREDICTIONS.get(prediction.casefold().replace("-", "_"))
    if known is None and override == "auto":
        raise ValueError(
            f"{where} has prediction type {shown(prediction)}: only epsilon and v_prediction are supported; set "
            "prediction to the one that the base was trained with"
        )
    return known or "epsilon"
