"""Small image models of random weights, as local folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDE = 32
_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGES = {**_LAYERS, "image_size": SIDE, "patch_size": 8}


def pictures(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def save(model: Any, folder: Path) -> Path:
    """Saves a model with values random enough that every image counts, and without a processor's file."""
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.2
    model.eval().save_pretrained(folder)
    return folder


def save_processor(folder: Path, kind: str = "ViTImageProcessor") -> None:
    settings = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "do_normalize": True,
        "do_rescale": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    return save(Dinov2Model(Dinov2Config(**{**_IMAGES, "mlp_ratio": 2})), folder)


def vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    return save(ViTModel(ViTConfig(**_IMAGES)), folder)


def resnet(folder: Path) -> Path:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    made = save(ResNetModel(config), folder)
    save_processor(folder)
    return made


def clip_vision(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return save(CLIPVisionModelWithProjection(CLIPVisionConfig(**_IMAGES, projection_dim=16)), folder)


def classifier(folder: Path, labels: list[str]) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(labels))
    config = ViTConfig(**_IMAGES, id2label=names, label2id={label: number for number, label in names.items()})
    return save(ViTForImageClassification(config), folder)


def siglip(folder: Path) -> Path:
    """With a tokenizer of letters, which ends each text with </s>, as SigLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

    letters = "abcdefghijklmnopqrstuvwxyz "
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{letter: 3 + i for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    text = {**_LAYERS, "vocab_size": len(vocabulary), "max_position_embeddings": 16, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_IMAGES))
    save(model, folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder
