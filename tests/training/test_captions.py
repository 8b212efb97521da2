"""What an image is shown with: several captions, tags shuffled and left out, long captions; all of it cached."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers
from sdxl_lora_core.text.encoding import encode_prompt_sdxl, stack_embeds, truncated_words
from sdxl_lora_core.text.prompt_cache import load_prompt
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import PassOfUpdate, TrainingData
from sdxl_lora_core.training.data.caption_variants import caption_variants
from sdxl_lora_core.training.run.runs import _pins_fewer_tags
from tests.micro.runs import SMALL, Cancelled, Train, cancel_at, data_of, load, lora_bytes, weights

TAGS = "zxq, one, two, three, four, five"
SHUFFLED = TrainConfig(shuffle_tags=True, caption_variants=40)
LONG = ", ".join(f"word{number}" for number in range(50))


def variants(config: TrainConfig, *captions: str, image: str = "image", words: tuple[str, ...] = ("zxq",)) -> list[str]:
    return list(caption_variants(captions, image, words, config))


# The forms of a caption


def test_a_caption_stays_as_it_is_without_shuffle_and_dropout() -> None:
    assert variants(TrainConfig(), "a,b ,  c", "d") == ["a,b ,  c", "d"]


def test_shuffled_tags_are_the_same_tags_behind_the_trigger_word() -> None:
    shown = variants(SHUFFLED, TAGS)
    assert len(shown) == 40 and len(set(shown)) > 20
    assert all(caption.startswith("zxq, ") for caption in shown)
    assert {tuple(sorted(caption.split(", "))) for caption in shown} == {tuple(sorted(TAGS.split(", ")))}
    first = Counter(caption.split(", ")[1] for caption in shown)
    assert set(first) == {"one", "two", "three", "four", "five"}


def test_a_trigger_word_of_two_tags_or_inside_of_a_tag_comes_first() -> None:
    shown = variants(SHUFFLED, "one, photo of ZXQ cat, two, three, b", words=("zxq, b",))
    assert all(caption.startswith("photo of ZXQ cat, b, ") for caption in shown)


def test_only_the_trigger_itself_is_pinned_where_it_is_a_tag() -> None:
    tags = "a cat, cat, cat ears, black cat, one"
    shown = variants(SHUFFLED, tags, words=("cat",))
    assert all(caption.startswith("cat, ") for caption in shown)
    assert {caption.split(", ")[1] for caption in shown} == {"a cat", "cat ears", "black cat", "one"}
    assert set(variants(replace(SHUFFLED, tag_dropout=1.0), tags, words=("cat",))) == {"cat"}
    assert set(variants(replace(SHUFFLED, tag_dropout=1.0), "one, cat ears", words=("cat",))) == {"cat ears"}


def test_the_fingerprint_changes_only_for_runs_that_pinned_more_than_the_trigger(
    micro_base: SDXLBase, pictures: Path, tmp_path: Path
) -> None:
    def content(text: str, **settings: Any) -> bool:
        folder = lay_captions(pictures, tmp_path / text.replace(", ", "-"), text)
        return _pins_fewer_tags(load(folder, trigger_word="cat"), replace(SMALL, **settings))

    assert content("cat, cat ears", shuffle_tags=True) and content("one, black cat, cat", tag_dropout=0.5)
    assert not content("cat, cat hat") and not content("cat, one", shuffle_tags=True)
    assert not content("cat ears, two", shuffle_tags=True)


def test_the_first_tags_are_kept() -> None:
    config = replace(SHUFFLED, keep_tags=2, tag_dropout=1.0)
    assert set(variants(config, TAGS)) == {"zxq, one, two"}
    moved = variants(replace(SHUFFLED, keep_tags=2), TAGS)
    assert {caption[:13] for caption in moved} == {"zxq, one, two"} and len(set(moved)) > 3


def test_tags_are_left_out_as_often_as_asked() -> None:
    config = TrainConfig(tag_dropout=0.3, caption_variants=1000)
    shown = variants(config, TAGS)
    counts = Counter(tag for caption in shown for tag in caption.split(", "))
    assert counts.pop("zxq") == 1000
    assert all(count == pytest.approx(700, abs=60) for count in counts.values())
    places = {tag: place for place, tag in enumerate(TAGS.split(", "))}
    assert all(caption.split(", ") == sorted(caption.split(", "), key=places.__getitem__) for caption in shown)


def test_another_separator_splits_elsewhere() -> None:
    shown = variants(replace(SHUFFLED, tag_separator=";"), "a, b; c")
    assert set(shown) == {"a, b; c", "c; a, b"}
    with pytest.raises(ValueError, match="tag_separator is empty"):
        TrainConfig(tag_separator="")


@pytest.mark.parametrize("separator", ["\n", "\t", ", \r"])
def test_a_separator_that_no_caption_contains_is_refused(separator: str) -> None:
    with pytest.raises(ValueError, match="tag_separator is .*, which no caption contains"):
        replace(SMALL, shuffle_tags=True, tag_separator=separator)


def test_the_forms_depend_on_seed_image_caption_and_number_only() -> None:
    shown = variants(SHUFFLED, TAGS)
    assert variants(replace(SHUFFLED, caption_variants=10), TAGS) == shown[:10]
    assert variants(SHUFFLED, "other", TAGS)[40:] == shown
    assert variants(replace(SHUFFLED, seed=1), TAGS) != shown
    assert variants(SHUFFLED, TAGS, image="another") != shown


# Several captions


def lay_captions(pictures: Path, folder: Path, text: str) -> Path:
    folder.mkdir()
    for number in range(3):
        shutil.copy(pictures / f"{number}.png", folder)
        (folder / f"{number}.txt").write_text(text.replace("#", str(number)))
    return folder


def test_lines_are_captions_only_when_asked(pictures: Path, tmp_path: Path) -> None:
    folder = lay_captions(pictures, tmp_path / "lines", "first #\n\n second #\n")
    assert load(folder).entries[1].captions == ("first 1 second 1",)
    dataset = load(folder, caption_per_line=True, trigger_word="zxq")
    assert dataset.entries[1].captions == ("zxq, first 1", "zxq, second 1")
    assert dataset.fingerprint != load(folder, trigger_word="zxq").fingerprint


def test_a_list_in_metadata_holds_several_captions(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "0.png", tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two\nlines"]}))
    (entry,) = load(tmp_path).entries
    assert entry.captions == ("one", "two lines")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", 2]}))
    with pytest.raises(ValueError, match="needs a file_name and a caption"):
        load(tmp_path)


# What a run draws


def shown_with(data: TrainingData, base: SDXLBase, index: int, steps: int) -> list[int]:
    """Which of the image's captions each step has, found by its embeddings."""
    embeds = [load_prompt(data.prompt_files[caption])[0] for caption in data.captions[index]]
    drawn = [data.batch(PassOfUpdate(step, (index,))).embeds[0] for step in range(steps)]
    return [next(n for n, known in enumerate(embeds) if torch.equal(known, shown)) for shown in drawn]


def test_each_step_draws_one_caption_and_draws_it_again(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    folder = lay_captions(pictures, tmp_path / "lines", "first, #\nsecond, #")
    dataset = load(folder, caption_per_line=True)
    data = data_of(micro_base, dataset, cache)
    drawn = shown_with(data, micro_base, 1, 40)
    assert Counter(drawn)[0] == pytest.approx(20, abs=9)
    assert shown_with(data_of(micro_base, dataset, cache), micro_base, 1, 40) == drawn
    assert shown_with(data_of(micro_base, dataset, cache, seed=1), micro_base, 1, 40) != drawn


def test_every_form_of_every_caption_is_encoded_before_the_run(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    folder = lay_captions(pictures, tmp_path / "tags", "a, b, c, d, #")
    data = data_of(micro_base, load(folder), cache, shuffle_tags=True, caption_variants=5, caption_dropout=0.5)
    assert [len(captions) for captions in data.captions] == [5, 5, 5]
    assert set(data.prompt_files) == {caption for captions in data.captions for caption in captions} | {""}
    assert all(path.exists() for path in data.prompt_files.values())
    eight = data_of(micro_base, load(folder), cache, shuffle_tags=True)
    assert set(shown_with(eight, micro_base, 0, 60)) == set(range(8))


@pytest.mark.parametrize(
    ("change", "beside"),
    [
        ({"shuffle_tags": True}, {}),
        ({"tag_dropout": 0.5}, {}),
        ({"keep_tags": 2}, {"shuffle_tags": True}),
        ({"tag_separator": "b"}, {"shuffle_tags": True}),
        ({"caption_variants": 2}, {"shuffle_tags": True}),
    ],
    ids=str,
)
def test_each_setting_changes_what_is_shown(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, change: dict[str, Any], beside: dict[str, Any]
) -> None:
    dataset = load(lay_captions(pictures, tmp_path / "tags", "a, b, c, d, e, #"))
    plain, changed = (data_of(micro_base, dataset, cache, **beside, **more) for more in ({}, change))
    batches = [
        [
            data.batch(
                PassOfUpdate(
                    step,
                    (
                        0,
                        1,
                    ),
                )
            )
            for step in range(4)
        ]
        for data in (plain, changed)
    ]
    assert not all(torch.equal(a.embeds, b.embeds) for a, b in zip(*batches, strict=True))
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(*batches, strict=True))


def test_what_is_shown_reaches_the_file(run: Train, pictures: Path, tmp_path: Path) -> None:
    dataset = load(lay_captions(pictures, tmp_path / "tags", "a, b, c, d, e, #"))
    plain = run(replace(SMALL, steps=1), dataset=dataset)
    assert weights(plain) != weights(run(replace(SMALL, steps=1, shuffle_tags=True), where="b", dataset=dataset))


def test_a_cancelled_run_with_all_of_it_continues_to_the_same_bytes(run: Train, pictures: Path, tmp_path: Path) -> None:
    folder = lay_captions(pictures, tmp_path / "tags", f"a, b, c, d, #\nanother, #, {LONG}")
    dataset = load(folder, caption_per_line=True, random_crops=2, flip=True)
    config = replace(SMALL, steps=3, shuffle_tags=True, tag_dropout=0.2, caption_dropout=0.2, caption_chunks=2)
    whole = run(config, dataset=dataset)
    with pytest.raises(Cancelled):
        run(config, where="b", dataset=dataset, on_step=cancel_at(2))
    assert lora_bytes(run(config, where="b", dataset=dataset)) == lora_bytes(whole)


# Long captions


def models(base: SDXLBase) -> tuple[list[Any], list[Any]]:
    parts: tuple[Any, ...] = ("text_encoder", "text_encoder_2")
    return list(load_tokenizers(base)), [load_part(base, part, torch.float32) for part in parts]


@torch.no_grad()
def test_a_long_caption_is_its_chunks_encoded_alone_and_laid_end_to_end(micro_base: SDXLBase) -> None:
    tokenizers, encoders = models(micro_base)
    embeds, pooled = encode_prompt_sdxl([LONG], tokenizers, encoders, chunks=3)
    ids = tokenizers[0](LONG, add_special_tokens=False).input_ids
    assert 150 < len(ids) < 225 and embeds.shape == (1, 231, 20)
    for number in range(3):
        part = ids[75 * number : 75 * number + 75]
        hidden = []
        for tokenizer, encoder, pad in zip(tokenizers, encoders, (49407, 0), strict=True):
            row = torch.tensor([[49406, *part, 49407, *[pad] * (75 - len(part))]])
            output = encoder(row, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            assert tokenizer.pad_token_id == pad
        torch.testing.assert_close(embeds[:, 77 * number : 77 * number + 77], torch.cat(hidden, dim=-1))
        if number == 0:
            torch.testing.assert_close(pooled, output.text_embeds)


@torch.no_grad()
def test_a_short_caption_is_the_same_with_and_without_chunks(micro_base: SDXLBase) -> None:
    tokenizers, encoders = models(micro_base)
    for prompt in ("", "a red heart"):
        for plain, chunked in zip(
            encode_prompt_sdxl([prompt], tokenizers, encoders),
            encode_prompt_sdxl([prompt], tokenizers, encoders, chunks=3),
            strict=True,
        ):
            assert torch.equal(plain, chunked)


def test_rows_of_different_length_stack_without_changing_what_attention_gives() -> None:
    short, long = torch.randn(77, 8), torch.randn(231, 8)
    batch = stack_embeds([short, long, torch.randn(154, 8)])
    assert batch.shape == (3, 462, 8)
    query = torch.randn(1, 5, 8)
    for row, embeds in zip(batch, (short, long), strict=False):
        attention = torch.nn.functional.scaled_dot_product_attention
        alone, repeated = (attention(query, keys[None], keys[None]) for keys in (embeds, row))
        torch.testing.assert_close(repeated, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_batch_holds_short_and_long_captions(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    folder = lay_captions(pictures, tmp_path / "long", "short #")
    (folder / "1.txt").write_text(LONG)
    data = data_of(micro_base, load(folder), cache, caption_chunks=3)
    assert data.batch(
        PassOfUpdate(
            0,
            (
                0,
                1,
            ),
        )
    ).embeds.shape == (2, 231, 20)
    cut = data_of(micro_base, load(folder), cache)
    assert cut.batch(
        PassOfUpdate(
            0,
            (
                0,
                1,
            ),
        )
    ).embeds.shape == (2, 77, 20)


def test_words_beyond_the_chunks_are_named(micro_base: SDXLBase) -> None:
    tokenizer, _ = load_tokenizers(micro_base)
    left = [truncated_words(LONG, tokenizer, chunks) for chunks in (1, 2, 3)]
    lengths = [len(tokenizer(words, add_special_tokens=False).input_ids) for words in left]
    total = len(tokenizer(LONG, add_special_tokens=False).input_ids)
    assert lengths == [total - 75, total - 150, 0] and math.ceil(total / 75) == 3


def test_the_report_and_the_log_name_captions_that_are_cut(
    run: Train, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lay_captions(pictures, tmp_path / "long", "short #")
    (folder / "1.txt").write_text(f"{LONG}\na short one")
    (folder / "2.txt").write_text("photographs of elephants, " * 5)  # long words, few tokens
    dataset = load(folder, caption_per_line=True)
    short = replace(SMALL, steps=1)
    (cut,) = run(short, dataset=dataset).report.cut_captions
    assert cut.startswith("1.png: truncated: ") and cut.endswith("word 4 9")
    assert "the caption of 1.png is too long for caption_chunks" in caplog.text
    whole = run(replace(short, caption_chunks=3), where="b", dataset=dataset)
    assert whole.report.cut_captions is None
