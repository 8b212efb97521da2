"""Captioning models of transformers from local folders: BLIP, BLIP-2 and Florence-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..messages import brief, shown
from ..runtime.library_logs import quiet_libraries
from ..sdxl.precision import resolve_dtype
from ..vision.model_folder import load_processor, load_weights, read_config, require_weights
from .config import LONGEST, CaptionConfig, Detail

# By model_type of config.json the class of the model, and that of the processor.
_CLASSES = {
    "blip": ("BlipForConditionalGeneration", "BlipProcessor"),
    "blip-2": ("Blip2ForConditionalGeneration", "Blip2Processor"),
    "florence2": ("Florence2ForConditionalGeneration", "Florence2Processor"),
}
# Xiao et al., Florence-2 (arXiv 2311.06242), appendix: its captioning tasks.
_TASKS: dict[Detail, str] = {
    "short": "<CAPTION>",
    "detailed": "<DETAILED_CAPTION>",
    "very_detailed": "<MORE_DETAILED_CAPTION>",
}
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")
_WANTED = (
    "use a folder with BLIP, BLIP-2 or Florence-2 of transformers (config.json, model.safetensors, tokenizer and "
    "preprocessor_config.json), or a tagger"
)


def is_captioner(config: dict[str, Any]) -> bool:
    return config.get("model_type") in _CLASSES


def require_captioner_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError naming what a folder of a captioning model lacks. Opens no weights."""
    import transformers

    config = read_config(folder, _WANTED)
    if not is_captioner(config):
        raise ValueError(f"{folder.name!r} contains a model of type {shown(config.get('model_type'))}: {_WANTED}")
    if not hasattr(transformers, _CLASSES[config["model_type"]][0]):
        raise ValueError(
            f"{folder.name!r} contains {config['model_type']}, which transformers {transformers.__version__} lacks: "
            'python -m pip install "transformers>=4.56"'
        )
    if config["model_type"] == "florence2" and "auto_map" in config:
        raise ValueError(
            f"{folder.name!r} is Florence-2 with code of its own, which is not run: use the version for transformers, "
            "such as florence-community/Florence-2-base"
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make an empty one
        raise FileNotFoundError(f"{folder.name!r} has no tokenizer ({', '.join(_TOKENIZERS)}): {_WANTED}")
    require_weights(folder, _WANTED)


def load_captioner(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The captioning model of a local folder, eval mode, on the CPU. Reads safetensors only and downloads nothing.

    Raises FileNotFoundError or ValueError naming what is missing.
    """
    import transformers

    require_captioner_folder(folder)
    name, _ = _CLASSES[read_config(folder, _WANTED)["model_type"]]
    return load_weights(folder, getattr(transformers, name), dtype=dtype)


@dataclass
class ModelCaptioner:
    """Captions images with the model in `folder`. `load` can return a model that is loaded already."""

    folder: Path
    config: CaptionConfig
    device: torch.device
    load: Callable[[Path], torch.nn.Module] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    def open(self) -> None:
        """Loads model and tokenizer. Raises ValueError naming what cannot be used."""
        dtype = resolve_dtype("auto", self.device)
        model: Any = self.load(self.folder) if self.load else load_captioner(self.folder, dtype)
        self._model = model.to(self.device)
        self._processor = _processor(self.folder, self._model)

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        """A caption for each image (uint8 [H, W, 3])."""
        model, processor = self._model, self._processor
        pictures = [Image.fromarray(image) for image in images]
        inputs = processor(images=pictures, text=self._texts(len(images)), return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        tokens = min(self.config.tokens, _room(model, inputs))
        with torch.inference_mode(), quiet_libraries():
            found = model.generate(**inputs, max_new_tokens=tokens, num_beams=self.config.beams, do_sample=False)
        return [text.strip() for text in processor.batch_decode(found, skip_special_tokens=True)]

    def _texts(self, count: int) -> list[str] | None:
        if self._model.config.model_type == "florence2":
            return [_TASKS[self.config.detail]] * count
        return [self.config.prompt] * count if self.config.prompt.strip() else None


def _room(model: Any, inputs: Any) -> int:
    """How many tokens the model can write: its positions without those of the prompt, the start and the end.

    T5, the text model of some BLIP-2, has no limit.
    """
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return LONGEST if positions is None else max(1, positions - prompt - 2)


def _processor(folder: Path, model: Any) -> Any:
    """The processor around the image processor based on Pillow (see load_processor)."""
    import transformers

    images = load_processor(folder, model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        kind: Any = getattr(transformers, _CLASSES[model.config.model_type][1])
        queries = {"num_query_tokens": model.config.num_query_tokens} if model.config.model_type == "blip-2" else {}
        return kind(images, tokenizer, **queries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the tokenizer in {folder.name!r} cannot be used: {brief(error)}; {_WANTED}") from error
