"""Image models in local folders: CLIP, SigLIP, DINOv2, ViT, a CNN, a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.evaluation.clip_score import score_images
from sdxl_lora_core.vision.classifier import class_logits, labels_of, load_classifier
from sdxl_lora_core.vision.features import image_features, load_encoder
from sdxl_lora_core.vision.image_text import load_clip
from sdxl_lora_core.vision.model_folder import batches, load_processor
from tests.micro import vision
from tests.micro.vision import SIDE, pictures, save_processor


def features_of(folder: Path, images: list[np.ndarray]) -> torch.Tensor:
    model = load_encoder(folder)
    with torch.inference_mode():
        return image_features(model, load_processor(folder, model), images)


def inputs(images: list[np.ndarray], mean: float | list[float], deviation: float | list[float]) -> torch.Tensor:
    values = (np.stack(images) / 255 - np.array(mean)) / np.array(deviation)
    return torch.from_numpy(values).permute(0, 3, 1, 2).float()


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_dinov2_gives_its_class_token(tmp_path: Path) -> None:
    from transformers import Dinov2Model

    folder, images = vision.dinov2(tmp_path / "dino"), pictures(3)
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(pixel_values=inputs(images, *IMAGENET)).last_hidden_state[:, 0]
    assert torch.allclose(features_of(folder, images), wanted, atol=1e-5)


def test_a_vit_without_its_pooler_gives_its_class_token(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ViTModel

    folder, images = vision.vit(tmp_path / "vit"), pictures(2)
    with torch.no_grad():
        wanted = ViTModel.from_pretrained(folder).eval()(pixel_values=inputs(images, *IMAGENET)).last_hidden_state[:, 0]
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.allclose(features_of(folder, images), wanted, atol=1e-5)


def test_a_cnn_gives_its_pooled_features(tmp_path: Path) -> None:
    from transformers import ResNetModel

    folder, images = vision.resnet(tmp_path / "cnn"), pictures(2)
    with torch.no_grad():
        wanted = ResNetModel.from_pretrained(folder).eval()(pixel_values=inputs(images, 0.5, 0.5)).pooler_output
    assert torch.allclose(features_of(folder, images), wanted.flatten(1), atol=1e-5)
    assert wanted.flatten(1).shape == (2, 16)


def test_a_clip_vision_model_gives_its_projection(tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    folder, images = vision.clip_vision(tmp_path / "clip_vision"), pictures(2)
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
        wanted = model(pixel_values=inputs(images, mean, deviation)).image_embeds
    assert torch.allclose(features_of(folder, images), wanted, atol=1e-5)


def test_siglip_scores_padded_texts_and_keeps_their_end(tmp_path: Path) -> None:
    folder, images = vision.siglip(tmp_path / "siglip"), pictures(2)
    report = score_images(images, ["red cat", "a very long text of many letters"], folder)
    model = load_clip(folder)
    with torch.no_grad():
        for picture, text, score in zip(images, ("red cat", "a very long tex"), report.scores, strict=True):
            ids = ["abcdefghijklmnopqrstuvwxyz ".index(letter) + 3 for letter in text] + [1]
            ids += [0] * (16 - len(ids))
            image = model.get_image_features(pixel_values=inputs([picture], 0.5, 0.5)).pooler_output[0]
            words = model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]
            assert score.cosine == pytest.approx(torch.cosine_similarity(image, words, dim=0).item(), abs=1e-5)
    assert "truncated to 15" in report.warnings[0] and "t   o f   m" in report.warnings[0]


def test_a_classifier_gives_logits_by_label(tmp_path: Path) -> None:
    folder, images = vision.classifier(tmp_path / "tagger", ["red", "long_hair", "cat"]), pictures(9)
    model, seen = load_classifier(folder), []
    assert labels_of(model) == ["red", "long_hair", "cat"]
    processor = load_processor(folder, model)
    logits = class_logits(model, processor, images, lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        assert torch.allclose(logits, model(pixel_values=inputs(images, *IMAGENET)).logits, atol=1e-5)
    assert seen == [(8, 9), (9, 9)]


def test_the_folders_own_processor_is_used_and_by_pillow(tmp_path: Path) -> None:
    folder = vision.vit(tmp_path / "vit")
    save_processor(folder)
    model, picture = load_encoder(folder), pictures(1, height=50, width=70)[0]
    processor = load_processor(folder, model)
    assert "Pil" in type(processor).__name__ or not hasattr(processor, "device")
    resized = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    (batch,) = batches(model, processor, [picture])
    assert torch.allclose(batch, inputs([resized], 0.5, 0.5), atol=1e-5)


def test_features_do_not_depend_on_the_batch_and_can_be_cancelled(tmp_path: Path) -> None:
    folder, images = vision.dinov2(tmp_path / "dino"), pictures(11)
    together = features_of(folder, images)
    assert torch.allclose(together[10:], features_of(folder, images[10:]), atol=1e-5)
    model = load_encoder(folder)

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image_features(model, load_processor(folder, model), images, cancel)


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _config(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_without("config.json"), FileNotFoundError, "'dino' has no config.json: use a folder with an image model"),
        (_without("model.safetensors"), FileNotFoundError, "'dino' has no model.safetensors"),
        (_config(model_type="my_net"), ValueError, "a model of type 'my_net', unknown to transformers"),
        (_config(), ValueError, "a model of type None"),
    ],
)
def test_folders_of_encoders_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    folder = vision.dinov2(tmp_path / "dino")
    spoil(folder)
    with pytest.raises(error, match=message):
        load_encoder(folder)


def test_a_model_that_classifies_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dino' contains no classifier"):
        load_classifier(vision.dinov2(tmp_path / "dino"))


def test_an_unknown_processor_is_refused_by_name(tmp_path: Path) -> None:
    folder = vision.vit(tmp_path / "vit")
    save_processor(folder, "MyOwnProcessor")
    with pytest.raises(ValueError, match="names the processor 'MyOwnProcessor', which transformers lacks"):
        load_processor(folder, load_encoder(folder))
