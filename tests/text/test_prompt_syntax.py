"""ComfyUI's prompt syntax by hand-listed readings. tests/comfy/test_prompts.py holds it to ComfyUI itself."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers
from sdxl_lora_core.text.embedding_files import EmbeddingFile, open_embedding
from sdxl_lora_core.text.encoding import encode_prompt_sdxl
from sdxl_lora_core.text.prompt_syntax import Piece, Reading, chunked, read_comfy
from sdxl_lora_core.text.text_model import TextModel
from tests.micro.images import WatchedParts, draw, hits, pixels, settings

CAT = EmbeddingFile("cat", Path("cat.safetensors"), "0" * 64)
LONG = ", ".join(f"word {number}" for number in range(40))


def vectors(count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"clip_l": torch.randn(count, 8, generator=draw), "clip_g": torch.randn(count, 12, generator=draw)}


def read(prompt: str) -> list[tuple[Any, float]]:
    pieces = read_comfy(prompt, lambda name: CAT if name == "cat" else None)
    return [(piece.content, round(piece.weight, 6)) for piece in pieces]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red heart", [("a red heart", 1)]),
        ("a (red:1.2) heart", [("a ", 1), ("red", 1.2), (" heart", 1)]),
        ("(a) ((b)) (((c)))", [("a", 1.1), (" ", 1), ("b", 1.21), (" ", 1), ("c", 1.331)]),
        ("((a:1.5))", [("a", 1.5)]),
        ("(a (b) c:0.5)", [("a ", 0.5), ("b", 0.55), (" c", 0.5)]),
        ("(a:-1) (b: 2 )", [("a", -1), (" ", 1), ("b", 2)]),
        ("(a:b) (:1.2) ()", [("a:b", 1.1), (" ", 1), (":1.2", 1.1), (" ", 1)]),
        (r"\(a\) (b\):1.3)", [("(a) ", 1), ("b)", 1.3)]),
        ("(a", [("(a", 1)]),
        ("((a)", [("(a", 1.1)]),
        ("a) (b:2)", [("a) (b:2)", 1)]),
        ("a embedding:cat b", [("a", 1), (CAT, 1), ("b", 1)]),
        ("(embedding:cat:1.3), red", [(CAT, 1.3), (", red", 1)]),
        ("embedding:cat, red\nembedding:cat", [(CAT, 1), (", red", 1), (CAT, 1)]),
        ("an embedding: cat", [("an", 1), (CAT, 1)]),
        ("a,embedding:cat", [("a,embedding:cat", 1)]),
    ],
)
def test_readings(prompt: str, pieces: list[tuple[Any, float]]) -> None:
    assert read(prompt) == pieces


def test_prompts_that_no_model_can_use_are_refused_in_a_sentence() -> None:
    def find(name: str) -> None:
        return None

    with pytest.raises(ValueError, match="more than 70 parentheses in each other: remove some"):
        read_comfy("(" * 5000 + "a" + ")" * 5000, find)
    assert read_comfy("(" * 50 + "a" + ")" * 50, find)[0].content == "a"
    with pytest.raises(ValueError, match=r"gives \(a:1e30\) the weight 1e\+30: write a number up to 1000"):
        read_comfy("(a:1e30)", find)
    with pytest.raises(ValueError, match=r"prompt is .*ud83d.* half a character"):
        GenerateConfig(prompt="a \ud83d")


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(ValueError, match=r"gives \(a:inf\) the weight inf: write a number up to 1000, .*\(a:1.2\)"):
        read("(a:inf)")
    with pytest.raises(ValueError, match="embedding: without a name"):
        read("embedding:")
    with pytest.raises(FileNotFoundError, match="names embedding:dog, and no embeddings folder has it: put dog"):
        read("a embedding:dog, b")


def test_short_pieces_stay_in_one_chunk_and_long_ones_do_not() -> None:
    def lengths(*groups: int) -> list[int]:
        return [len(row) for row in chunked([[(1, 1.0)] * group for group in groups])]

    assert lengths() == [0]
    assert lengths(75) == [75] and lengths(76) == [75, 1] and lengths(160) == [75, 75, 10]
    assert lengths(70, 7) == [70, 7] and lengths(70, 8) == [75, 3] and lengths(70, 5, 1) == [75, 1]
    assert lengths(75, 8) == [75, 8] and lengths(70, 7, 69) == [70, 75, 1]


@pytest.fixture(scope="module")
def text_model(micro_base: SDXLBase) -> TextModel:
    encoders = [load_part(micro_base, part, torch.float32) for part in ("text_encoder", "text_encoder_2")]
    return TextModel(load_tokenizers(micro_base), encoders)


@torch.no_grad()
def encode(model: TextModel, *pieces: Piece, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, pooled = model(Reading(list(pieces), limit, one_tokenizer=False), {})
    return hidden[0], pooled[0]


def test_a_weight_scales_the_distance_to_the_empty_prompt(text_model: TextModel) -> None:
    empty, _ = encode(text_model, Piece(""))
    plain, pooled = encode(text_model, Piece("a red heart"))
    changed, same = encode(text_model, Piece("a "), Piece("red", 1.5), Piece(" heart", 0.0))
    wanted = plain.clone()
    wanted[2] = empty[2] + 1.5 * (plain[2] - empty[2])
    wanted[3] = empty[3]
    torch.testing.assert_close(changed, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(same, pooled, atol=1e-6, rtol=0)
    assert torch.equal(encode(text_model, Piece("a "), Piece("red"), Piece(" heart"))[0], plain)


def test_a_long_prompt_is_read_as_captions_are(text_model: TextModel) -> None:
    encoders: Any = list(text_model.encoders)
    with torch.no_grad():
        wanted, pooled = encode_prompt_sdxl([LONG], text_model.tokenizers, encoders, chunks=3)
    found, first = encode(text_model, Piece(LONG))
    assert torch.equal(found, wanted[0]) and torch.equal(first, pooled[0]) and len(found) == 77 * 2
    cut, _ = encode(text_model, Piece(LONG), limit=1)
    assert len(cut) == 77
    torch.testing.assert_close(cut, found[:77], atol=1e-6, rtol=0)


def test_an_exclamation_mark_is_padding_to_the_second_tokenizer_alone(text_model: TextModel) -> None:
    def second(text: str, one_tokenizer: bool) -> torch.Tensor:
        with torch.no_grad():
            return text_model(Reading([Piece(text)], None, one_tokenizer), {}).hidden[0, :, 8:]

    assert torch.equal(second("a red heart", True), second("a red heart", False))
    assert not torch.equal(second("a red heart!", True), second("a red heart!", False))


def test_an_embedding_stands_where_it_is_named_and_leaves_no_trace(text_model: TextModel, tmp_path: Path) -> None:
    encoders: Any = list(text_model.encoders)
    before = [encoder.get_input_embeddings() for encoder in encoders]
    known = [encoder.get_input_embeddings().weight for encoder in encoders]
    red = text_model.tokenizers[0]("red", add_special_tokens=False).input_ids
    save_file({"clip_l": known[0][red].clone(), "clip_g": known[1][red].clone()}, tmp_path / "red.safetensors")
    file = open_embedding("red", tmp_path / "red.safetensors", None)
    found, pooled = encode(text_model, Piece("a "), Piece(file, 1.3), Piece(" heart"))
    wanted, first = encode(text_model, Piece("a "), Piece("red", 1.3), Piece(" heart"))
    assert torch.equal(found, wanted) and torch.equal(pooled, first)
    assert all(encoder.get_input_embeddings() is one for encoder, one in zip(encoders, before, strict=True))


# Files


@pytest.mark.parametrize(
    "tensors",
    [
        vectors(),
        {"text_encoders_0": vectors()["clip_l"], "text_encoders_1": vectors()["clip_g"]},
        {f"bundle_emb.cat.{key}": rows for key, rows in vectors().items()},
        {key: rows.half() for key, rows in vectors().items()},
    ],
    ids=["clip_l", "diffusers", "bundled", "half"],
)
def test_embedding_files_of_every_writer_are_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "cat.safetensors")
    found = open_embedding("cat", tmp_path / "cat.safetensors", None).vectors()
    assert found["text_encoder"].dtype == torch.float32
    for part, wanted in zip(("text_encoder", "text_encoder_2"), vectors().values(), strict=True):
        torch.testing.assert_close(found[part], wanted, atol=2e-3, rtol=0)  # type: ignore[index]


def test_a_vector_alone_is_one_token(tmp_path: Path) -> None:
    save_file({key: rows[0] for key, rows in vectors().items()}, tmp_path / "cat.safetensors")
    assert open_embedding("cat", tmp_path / "cat.safetensors", None).vectors()["text_encoder_2"].shape == (1, 12)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.zeros(2, 768)}, "embedding:cat is for Stable Diffusion 1.x: SDXL needs vectors for both"),
        ({"clip_l": torch.zeros(2, 768)}, "embedding:cat is for Stable Diffusion 1.x"),
        ({"emb_params": torch.zeros(2, 1024)}, "embedding:cat is for Stable Diffusion 2.x"),
        (
            {"a.weight": torch.zeros(2, 5)},
            r"embedding:cat is not an embedding for SDXL \(its first tensors: a.weight\)",
        ),
        (
            {"clip_l": torch.zeros(2, 8), "clip_g": torch.zeros(3, 12)},
            "2 vectors for one text encoder and 3 for the",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save_file(tensors, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match=message):
        open_embedding("cat", tmp_path / "cat.safetensors", None)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}}, tmp_path / "cat.pt")
    with pytest.raises(ValueError, match=r"embedding:cat cannot be read: cat.pt is a pickle.*convert it to"):
        open_embedding("cat", tmp_path / "cat.pt", None)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_file({key: rows / 0 for key, rows in vectors().items()}, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="embedding:cat contains NaN or infinity"):
        open_embedding("cat", tmp_path / "cat.safetensors", None).vectors()


# Images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(vectors(), tmp_path / "cat.safetensors")
    return tmp_path


def comfy(prompt: str, **changes: Any) -> Any:
    return settings(prompt=prompt, prompt_syntax="comfy", steps=2, **changes)


def finder(folder: Path) -> dict[str, Any]:
    return {"find_embedding": lambda name: file if (file := folder / f"{name}.safetensors").exists() else None}


@pytest.mark.slow
def test_a_prompt_without_syntax_is_the_same_image_in_both(micro_base: SDXLBase) -> None:
    plain = pixels(micro_base, settings(prompt="a red heart", negative_prompt="blue", steps=2))
    assert (pixels(micro_base, comfy("a red heart", negative_prompt="blue")) == plain).all()
    assert (pixels(micro_base, comfy("a (red:1.8) heart", negative_prompt="blue")) != plain).any()
    assert (pixels(micro_base, comfy("a red heart", negative_prompt="(blue:1.8)")) != plain).any()


@pytest.mark.slow
def test_an_embedding_moves_pixels_and_its_content_the_key(
    micro_base: SDXLBase, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = {**finder(folder), "cache_folder": tmp_path_factory.mktemp("images"), "parts": WatchedParts()}
    options["prompt_cache"] = tmp_path_factory.mktemp("prompts")
    both = comfy("a heart\na embedding:cat heart", prompt_per_line=True, negative_prompt="embedding:cat")
    without, first = draw(micro_base, both, **options)
    assert (without.pixels != first.pixels).any()
    assert hits(draw(micro_base, both, **options)) == [True, True]
    assert hits(draw(micro_base, comfy("a heart", negative_prompt="embedding:cat"), **options)) == [True]
    assert draw(micro_base, comfy("a embedding:cat heart"), **options)[0].key != first.key
    plain = draw(micro_base, comfy("a heart"), **options)[0]
    options["parts"].taken_events()
    save_file(vectors(seed=1), folder / "cat.safetensors")
    second = draw(micro_base, both, **options)[1]
    assert not second.hit and (second.pixels != first.pixels).any()
    assert draw(micro_base, comfy("a heart"), **options)[0].key == plain.key, "another prompt's embedding"
    assert not options["parts"].taken_events("load"), "an embedding is no reason to load an encoder"


def test_a_picture_has_the_words_of_its_prompt(micro_base: SDXLBase, folder: Path) -> None:
    def words(prompt: str, syntax: Any = "comfy") -> str:
        config = settings(prompt=prompt, prompt_syntax=syntax, steps=1)
        return draw(micro_base, config, **finder(folder))[0].words

    assert words("a (red:1.3)  heart\n((big)), embedding:cat \\(new\\)") == "a red heart big, (new)"
    assert words("embedding:cat") == "embedding:cat", "CLIP Score needs a line for each image"
    assert words("a (red:1.3)\nheart", "plain") == "a (red:1.3) heart"


def test_a_picture_says_which_embeddings_it_was_made_with(micro_base: SDXLBase, folder: Path) -> None:
    prompts = comfy("a embedding:cat heart", negative_prompt="embedding:cat", guidance=3.0)
    image = draw(micro_base, prompts, graph={}, **finder(folder))[0]
    digest = hashlib.sha256((folder / "cat.safetensors").read_bytes()).hexdigest()
    assert f'"embed:cat": "{digest[:10]}"' in image.texts["parameters"]


def test_a_missing_embedding_stops_before_anything_is_loaded(micro_base: SDXLBase, folder: Path) -> None:
    parts = WatchedParts()
    with pytest.raises(FileNotFoundError, match="embedding:dog, and no embeddings folder has it"):
        draw(micro_base, comfy("a embedding:dog heart"), parts=parts, **finder(folder))
    assert not parts.events
    unguided = comfy("a heart", negative_prompt="embedding:dog", guidance=1.0)
    assert draw(micro_base, unguided, **finder(folder)), "without guidance nobody reads the negative prompt"


def test_an_embedding_for_another_width_names_both(micro_base: SDXLBase, folder: Path) -> None:
    save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, folder / "cat.safetensors")
    with pytest.raises(ValueError, match="embedding:cat has vectors of 768 numbers for clip_l, and this base's have 8"):
        draw(micro_base, comfy("embedding:cat"), **finder(folder))


def test_prompts_of_unlike_length_are_denoised_apart(micro_base: SDXLBase) -> None:
    """Together they would be repeated to the least common multiple of their lengths: 7, 8, 9, 11 chunks to 5544."""
    prompts = ["red", " ".join(["blue"] * 80), "green", " ".join(["cat"] * 160)]
    request = comfy("\n".join(prompts), prompt_per_line=True, batch_size=4, guidance=1.0)
    parts, lengths = WatchedParts(), []
    draw(micro_base, comfy("red"), parts=parts)

    def note(module: Any, inputs: Any, arguments: dict[str, Any]) -> None:
        lengths.append(tuple(arguments["encoder_hidden_states"].shape[:2]))

    hook = parts.held("unet").register_forward_pre_hook(note, with_kwargs=True)
    images = draw(micro_base, request, parts=parts)
    hook.remove()
    assert set(lengths) == {(1, 154), (1, 231), (2, 77)}
    assert [image.prompt for image in images] == prompts


@pytest.mark.slow
def test_a_long_prompt_goes_with_a_short_negative_one(micro_base: SDXLBase, caplog: pytest.LogCaptureFixture) -> None:
    cut = pixels(micro_base, settings(prompt=LONG, negative_prompt="blue", steps=2))
    assert re.search(r"its end has no effect \(set long_prompts to chunks to use it\): .*3 9$", caplog.text.strip())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        whole = pixels(micro_base, settings(prompt=LONG, negative_prompt="blue", steps=2, long_prompts="chunks"))
        assert (pixels(micro_base, comfy(LONG, negative_prompt="blue")) == whole).all()
        short = settings(prompt="a heart", steps=2, long_prompts="chunks")
        assert (pixels(micro_base, short) == pixels(micro_base, settings(prompt="a heart", steps=2))).all()
        pixels(micro_base, comfy("red", negative_prompt=LONG))
    assert (whole != cut).any() and "has no effect" not in caplog.text
    longer = f"{LONG}, {LONG}, {LONG}"
    assert pixels(micro_base, comfy(longer, negative_prompt=LONG, count=2, batch_size=2)).shape[0] == 2


def test_prompts_outer_count_inner_with_the_same_seeds(micro_base: SDXLBase) -> None:
    both = settings(prompt="a red heart\n\n a blue star ", prompt_per_line=True, count=2, steps=1)
    images = draw(micro_base, both)
    assert [(image.prompt, image.seed) for image in images] == [
        ("a red heart", 5),
        ("a red heart", 6),
        ("a blue star", 5),
        ("a blue star", 6),
    ]
    assert (images[3].pixels == pixels(micro_base, settings(prompt="a blue star", seed=6, steps=1))[0]).all()
