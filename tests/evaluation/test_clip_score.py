import json
import math
import shutil
import string

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.evaluation.clip_score import Score, ScoreReport, annotate, plain_text, rank, score_images
from sdxl_lora_core.vision.image_text import embed_text, load_clip, load_tokenizer
from sdxl_lora_core.vision.model_folder import load_processor
from tests.micro.vision import pictures
from tools.run_workflow import ROOT

LENGTH, SIDE = 16, 32
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
LETTERS = list(string.ascii_lowercase)
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "!</w>", "<|startoftext|>", "<|endoftext|>"]
START, END = len(TOKENS) - 2, len(TOKENS) - 1


def make_clip(folder, text_eos=END, dtype=torch.float32):
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(TOKENS), "max_position_embeddings": LENGTH, "eos_token_id": text_eos}
    text |= {"bos_token_id": START, "pad_token_id": END}
    vision = {**layers, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in model.parameters():  # random enough that every picture and every text counts
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.2
    model.to(dtype).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    with torch.random.fork_rng():
        return make_clip(tmp_path_factory.mktemp("models") / "random-clip")


def ids_of(text):
    tokens = [token for word in text.split() for token in [*word[:-1], f"{word[-1]}</w>"]]
    return [START, *(TOKENS.index(token) for token in tokens), END]


def reference_cosine(folder, picture, ids):
    """Preprocessing, pooling, projection and cosine by hand; only the two transformers are the library's."""
    model = load_clip(folder)
    pixels = ((picture / 255 - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)
    with torch.no_grad():
        text = model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0, ids.index(END)].numpy()
        patches = model.vision_model(pixel_values=torch.from_numpy(pixels)).last_hidden_state[:, 0]
        image = model.vision_model.post_layernorm(patches)[0].numpy()
    a, b = model.text_projection.weight.numpy() @ text, model.visual_projection.weight.numpy() @ image
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def fake_loader(cosines):
    """A model whose pictures have exactly these cosines with any text; NaN makes no vector at all."""

    def load(folder):
        model, left = load_clip(folder), list(cosines)

        def image_features(pixel_values):
            rows = [left.pop(0) for _ in pixel_values]
            return torch.tensor([[c, math.sqrt(1 - c * c)] if not math.isnan(c) else [c, c] for c in rows]) * 7

        model.get_image_features = image_features
        model.get_text_features = lambda input_ids: torch.tensor([[3.0, 0.0]])
        return model

    return load


def test_scores_equal_a_reference_by_hand(clip):
    images, prompts = pictures(3), ["red cat", "a blue dog on it", "x"]
    report = score_images(images, prompts, clip)
    for image, prompt, score in zip(images, prompts, report.scores, strict=True):
        wanted = reference_cosine(clip, image, ids_of(prompt))
        assert score.cosine == pytest.approx(wanted, abs=1e-6)
        assert score.clip_score == pytest.approx(100 * max(wanted, 0), abs=1e-4)
        assert score.clipscore_w25 == pytest.approx(2.5 * max(wanted, 0), abs=1e-5)
        assert score.prompt == prompt
    assert len({round(score.cosine, 3) for score in report.scores}) == 3
    assert report.model == "random-clip" and report.warnings == ()


def test_no_picture_changes_the_score_of_another(clip):
    images = pictures(11)
    together = score_images(images, ["red cat"], clip).scores
    alone = [score_images([image], ["red cat"], clip).scores[0] for image in images[:3] + images[-1:]]
    for a, b in zip([*together[:3], together[-1]], alone, strict=True):
        assert a.cosine == pytest.approx(b.cosine, abs=1e-6)
    backwards = score_images(images[::-1], ["red cat"], clip).scores
    assert [s.cosine for s in backwards[::-1]] == pytest.approx([s.cosine for s in together], abs=1e-6)


def test_pictures_are_resized_by_pillow_and_cropped_in_the_middle(clip):
    picture = pictures(1, height=60, width=100)[0]
    resized = Image.fromarray(picture).resize((53, SIDE), Image.Resampling.BICUBIC)
    left = (53 - SIDE) // 2
    wanted = (np.asarray(resized.crop((left, 0, left + SIDE, SIDE))) / 255 - MEAN) / STD
    pixels = load_processor(clip, load_clip(clip))(images=[Image.fromarray(picture)], return_tensors="pt")
    assert np.abs(pixels["pixel_values"][0].numpy().transpose(1, 2, 0) - wanted).max() < 1e-5


def test_a_processor_in_the_folder_is_used(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0, 0, 0],
        "image_std": [1, 1, 1],
        "do_normalize": True,
        "do_rescale": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = Image.new("RGB", (SIDE, SIDE), (255, 0, 51))
    pixels = load_processor(folder, load_clip(folder))(images=[picture], return_tensors="pt")["pixel_values"]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_a_long_prompt_keeps_its_end_token_and_the_warning_names_what_was_cut(clip):
    fits, long = "a " * (LENGTH - 2), "a " * (LENGTH - 2) + "red cat"
    image = pictures(1)
    assert score_images(image, [fits], clip).warnings == ()
    report = score_images(image, [long], clip)
    assert "'red cat'" in report.warnings[0] and f"was truncated to {LENGTH - 2}" in report.warnings[0]
    wanted = reference_cosine(clip, image[0], [START, *[TOKENS.index("a</w>")] * (LENGTH - 2), END])
    assert report.scores[0].cosine == pytest.approx(wanted, abs=1e-6)


def test_the_bundled_model_does_not_fall_at_77_tokens():
    """A truncation that loses the end token pools another one (torchmetrics #2883: 26 falls to 17)."""
    image = [np.asarray(Image.open(ROOT / "assets/sample-dataset/images/11_red_ring.png").convert("RGB"))]
    scores = [
        score_images(image, ["x " * count], ROOT / "assets/tiny-clip").scores[0].cosine for count in range(72, 80)
    ]
    assert scores[3:] == pytest.approx([scores[3]] * 5, abs=1e-6)
    assert abs(scores[3] - scores[2]) < 0.05 and abs(scores[2] - scores[0]) < 0.05


def test_configs_with_the_old_end_token_score_alike(clip, tmp_path):
    old = make_clip(tmp_path / "old", text_eos=2)
    images = pictures(2)
    new_scores, old_scores = (score_images(images, ["red cat"], folder).scores for folder in (clip, old))
    assert [s.cosine for s in old_scores] == pytest.approx([s.cosine for s in new_scores], abs=1e-6)


def test_half_precision_files_are_computed_in_float32(tmp_path):
    half = make_clip(tmp_path / "half", dtype=torch.float16)
    model = load_clip(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
    wanted = reference_cosine(half, pictures(1)[0], ids_of("cat"))
    assert score_images(pictures(1), ["cat"], half).scores[0].cosine == pytest.approx(wanted, abs=1e-6)


def test_prompt_syntax_is_not_scored(clip):
    images = pictures(2)
    decorated = score_images(images, ["(red:1.3) [cat] <lora:my_style:0.8> BREAK embedding:bad_hands"], clip)
    assert decorated == score_images(images, ["red cat"], clip)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a red cat", "a red cat"),
        ("a (red:1.2) cat", "a red cat"),
        ("((a cat:1.1), dog:.5)", "a cat, dog"),
        ("[cat], ((dog))", "cat, dog"),
        ("<lora:style:0.8>a cat<lyco:x:1:te=0>", "a cat"),
        ("a cat BREAK a dog", "a cat, a dog"),
        ("breakfast, DAYBREAK", "breakfast, DAYBREAK"),
        ("cat, embedding:easy-negative, dog", "cat, dog"),
        ("(embedding:bad_hands:1.2), cat", "cat"),
        (r"smile \(happy\), cat", "smile (happy), cat"),
        (r"(a \(b\):1.3)", "a (b)"),
        ("ratio 16:9, time 12:30", "ratio 16:9, time 12:30"),
        ("a  cat ,, \n dog ,", "a cat, dog"),
        ("a < b", "a < b"),
        ("", ""),
    ],
)
def test_plain_text(prompt, text):
    assert plain_text(prompt) == text


def test_one_prompt_for_all_or_one_each(clip):
    images = pictures(3)
    assert [score.prompt for score in score_images(images, ["cat"], clip).scores] == ["cat"] * 3
    with pytest.raises(ValueError, match="2 prompts and 3 images"):
        score_images(images, ["cat", "dog"], clip)
    with pytest.raises(ValueError, match="0 prompts and 3 images"):
        score_images(images, [], clip)
    with pytest.raises(ValueError, match="0 images"):
        score_images([], ["cat"], clip)


def test_an_empty_prompt_is_scored_with_a_warning(clip):
    report = score_images(pictures(1), ["<lora:x:1>"], clip)
    assert "no text" in report.warnings[0] and math.isfinite(report.scores[0].cosine)


def test_negative_cosines_are_clamped_image_by_image(clip):
    report = score_images(pictures(2), ["cat"], clip, load=fake_loader([-0.3, 0.5]))
    assert [score.cosine for score in report.scores] == pytest.approx([-0.3, 0.5])
    assert [score.clip_score for score in report.scores] == pytest.approx([0, 50])
    assert [score.clipscore_w25 for score in report.scores] == pytest.approx([0, 1.25])
    assert report.mean == pytest.approx(25) and report.deviation == pytest.approx(50 / math.sqrt(2))


def test_what_is_not_a_number_is_ranked_last_and_said(clip, caplog):
    report = score_images(pictures(4), ["cat"], clip, load=fake_loader([math.nan, 0.2, -0.9, 0.4]))
    assert report.order == (3, 1, 2, 0) and report.mean == pytest.approx(20)
    assert "image 0 has no score" in report.warnings[0] and "image 0 has no score" in caplog.text
    summary = json.loads(report.to_json())
    assert summary["scores"][0]["clip_score"] is None and summary["scores"][0]["rank"] == 4
    assert "no score" not in json.dumps(summary["scores"]) and summary["max"] == pytest.approx(40)


def test_reports_without_a_single_number_are_still_valid(clip):
    report = score_images(pictures(2), ["cat"], clip, load=fake_loader([math.nan] * 2))
    assert report.order == (0, 1) and math.isnan(report.mean) and json.loads(report.to_json())["mean"] is None


def test_ties_keep_their_order():
    assert rank([0.1, 0.5, 0.5, math.nan, 0.1, 0.5, math.nan]) == (1, 2, 5, 0, 4, 3, 6)


def test_features_come_as_tensor_or_as_object(clip):
    model = load_clip(clip)
    tokenizer = load_tokenizer(clip, model)
    one = embed_text(model, tokenizer, "cat", [])
    raw = model.get_text_features(input_ids=torch.tensor([ids_of("cat")]))
    tensor = raw if isinstance(raw, torch.Tensor) else raw.pooler_output
    model.get_text_features = lambda input_ids: tensor
    assert torch.allclose(one, embed_text(model, tokenizer, "cat", []))
    assert one.shape == (16,) and one.norm().item() == pytest.approx(1)


def test_the_report_names_model_convention_and_spread(clip):
    summary = json.loads(score_images(pictures(3), ["cat"], clip, load=fake_loader([0.1, 0.3, 0.2])).to_json())
    assert summary["model"] == "random-clip" and "100 * max(cosine, 0) per image" in summary["convention"]
    assert (summary["images"], summary["order"]) == (3, [1, 2, 0])
    assert (summary["mean"], summary["max"]) == pytest.approx((20, 30))
    assert summary["standard_deviation"] == pytest.approx(10)
    assert [row["rank"] for row in summary["scores"]] == [3, 1, 2]


def test_a_clip_of_small_drawings_warns_about_large_images(clip):
    assert score_images(pictures(1, height=2 * SIDE), ["cat"], clip).warnings == ()
    warnings = score_images(pictures(1, height=2 * SIDE, width=100), ["cat"], clip).warnings
    assert len(warnings) == 1 and "random-clip" in warnings[0] and "100 px" in warnings[0]


def test_the_global_random_state_and_gradients_are_left_alone(clip):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    score_images(pictures(1), ["cat"], clip)
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


# folders that are no CLIP


def without(name):
    return lambda folder: (folder / name).unlink()


def with_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without("config.json"), FileNotFoundError, "no config.json"),
        (with_config("[]"), ValueError, "not a JSON object"),
        (with_config("{"), ValueError, "not a JSON object"),
        (
            with_config('{"model_type": "clip_vision_model"}'),
            ValueError,
            "type 'clip_vision_model', not 'clip' or 'siglip'",
        ),
        (without("model.safetensors"), FileNotFoundError, "no model.safetensors"),
        (without("vocab.json"), FileNotFoundError, "has neither tokenizer.json nor both of vocab.json and merges.txt"),
        (without("merges.txt"), FileNotFoundError, "has neither tokenizer.json nor both of vocab.json and merges.txt"),
    ],
)
def test_incomplete_folders_are_refused_by_name(clip, tmp_path, spoil, error, message):
    folder = shutil.copytree(clip, tmp_path / "spoilt")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody may open")
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        score_images(pictures(1), ["cat"], folder)
    assert "spoilt" in str(caught.value)


def test_missing_and_truncated_weights_are_refused(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(clip, tmp_path / "spoilt")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, as visual_projection.weight"):
        load_clip(folder)
    data = (clip / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_clip(folder)


@pytest.mark.parametrize("text_eos", [END - 1, 2])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, text_eos):
    folder = make_clip(tmp_path / "mixed", text_eos)
    tokens = TOKENS if text_eos != 2 else [*TOKENS[:-1], "?</w>", TOKENS[-1], "??"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    with pytest.raises(ValueError, match="end token"):
        score_images(pictures(1), ["cat"], folder)


# the pictures with their scores


def report_of(scores):
    rows = tuple(Score(s / 100, s, s / 40, "a cat") for s in scores)
    return ScoreReport(rows, rank([row.cosine for row in rows]), (), "x")


def test_annotated_pictures_keep_order_and_pixels_and_get_a_strip_of_their_own():
    images = [np.full((128, 128, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    annotated = annotate(images, report_of([20.0, math.nan, 31.0]))
    assert [int(image[0, 0, 0]) for image in annotated] == [10, 20, 30]
    assert len({image.shape for image in annotated}) == 1 and annotated[0].dtype == np.uint8
    assert annotated[2].shape[0] > 128 and annotated[2].shape[1:] == (128, 3)
    assert (annotated[2][:128] == 30).all() and (annotated[2][128:] < 100).any() and (annotated[2][128:] == 255).any()
    assert len({image[128:].tobytes() for image in annotated}) == 3


def test_the_strip_shows_rank_and_score():
    strips = {
        scores: annotate(pictures(2, width=256), report_of(scores))[0][SIDE:].tobytes()
        for scores in ((20.0, 31.0), (20.0, 30.0), (20.0, 10.0), (21.0, 31.0))
    }
    assert strips[20.0, 31.0] == strips[20.0, 30.0]
    assert len(set(strips.values())) == 3


def test_annotating_other_pictures_than_those_scored_is_an_error():
    with pytest.raises(ValueError, match="1 images and 2 scores"):
        annotate(pictures(1), report_of([1.0, 2.0]))
