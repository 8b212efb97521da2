"""The variants of a comparison, as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_lora_core.evaluation.variants import (
    Axis,
    LoRAFiles,
    Variant,
    make_variants,
    parse_axis,
    read_settings,
    require_distinct,
    stack_name,
)
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.lora.stack import LoRARef

CONFIG = GenerateConfig(prompt="a cat")
STYLE, OWN = (LoRARef(Path(f"{name}.safetensors"), f"{name}.safetensors", 1.0, 1.0) for name in ("style", "own"))


def find(name: str, model: float, clip: float) -> LoRARef:
    if "missing" in name:
        raise FileNotFoundError(name)
    return LoRARef(Path(name), name, model, clip)


FILES = LoRAFiles(find, lambda name: {100: "own/step-000100.safetensors", 50: "own/step-000050.safetensors"})


def variants(columns: str, rows: str = "", stack: tuple[LoRARef, ...] = (STYLE, OWN)) -> list[Variant]:
    base, *others = make_variants(stack, parse_axis(columns), parse_axis(rows), FILES)
    assert (base.name, base.loras, base.settings) == ("base", (), {})
    return others


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("", None),
        ("  ", None),
        ("strength: 0.5, 1", Axis("strength", ("0.5", "1"))),
        ("steps:10,20,", Axis("steps", ("10", "20"))),
        (
            "blocks: mid_block=0, up_blocks.0=1 | mid_block=1",
            Axis("blocks", ("mid_block=0, up_blocks.0=1", "mid_block=1")),
        ),
        ("checkpoint: all", Axis("checkpoint", ("all",))),
    ],
)
def test_axes(text: str, axis: Axis | None) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strength", "'strength' is not an axis"),
        ("strength:", "is not an axis: write what changes and its values"),
        ("colour: red", "'colour' cannot be an axis; known are lora, checkpoint, strength"),
        ("seed: 1, 2", "'seed' cannot be an axis"),
        ("steps: 10, 20, 10", "the axis steps has the value 10 twice"),
    ],
)
def test_what_is_no_axis_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_axis(text)


def test_without_axes_the_stack_is_compared_with_the_base() -> None:
    (variant,) = variants("")
    assert (variant.name, variant.loras, variant.settings) == ("style + own", (STYLE, OWN), {})
    assert variants("", stack=()) == []


@pytest.mark.parametrize(
    ("axis", "strengths"), [("strength", (0.5, 0.5)), ("strength_model", (0.5, 1.0)), ("strength_clip", (1.0, 0.5))]
)
def test_strengths_are_those_of_the_last_lora(axis: str, strengths: tuple[float, float]) -> None:
    half, whole = variants(f"{axis}: 0.5, 1")
    assert half.loras[0] == whole.loras[0] == STYLE and whole.loras == (STYLE, OWN)
    assert (half.loras[1].strength_model, half.loras[1].strength_clip) == strengths
    assert (half.name, half.column, half.row) == (f"{axis} 0.5", f"{axis} 0.5", "")


def test_blocks_are_those_of_the_last_lora() -> None:
    first, second = variants("blocks: mid_block=0 | up_blocks.0=0.5, mid_block=1")
    assert (first.loras[1].blocks, second.loras[1].blocks) == ("mid_block=0", "up_blocks.0=0.5, mid_block=1")
    with pytest.raises(ValueError, match="own"):
        variants("blocks: middle=0")


def test_loras_join_the_stack_and_then_have_the_strength() -> None:
    found = variants("strength: 0.5, 1", "lora: a.safetensors, b.safetensors")
    assert [variant.name for variant in found] == [
        "a / strength 0.5",
        "a / strength 1",
        "b / strength 0.5",
        "b / strength 1",
    ]
    assert found[2].loras == (STYLE, OWN, LoRARef(Path("b.safetensors"), "b.safetensors", 0.5, 0.5))
    assert (found[2].row, found[2].column) == ("b", "strength 0.5")


def test_checkpoints_take_the_place_of_the_last_lora_with_its_strengths() -> None:
    half = LoRARef(OWN.path, OWN.name, 0.5, 0.25, "mid_block=0")
    found = variants("checkpoint: all", stack=(STYLE, half))
    assert [variant.column for variant in found] == ["checkpoint 50", "checkpoint 100", "checkpoint last"]
    assert found[2].loras == (STYLE, half)
    name = "own/step-000050.safetensors"
    assert found[0].loras == (STYLE, LoRARef(Path(name), name, 0.5, 0.25, "mid_block=0"))
    assert [variant.column for variant in variants("checkpoint: last, 100")] == ["checkpoint last", "checkpoint 100"]
    with pytest.raises(ValueError, match="own.safetensors has no checkpoint '70'; known are 50, 100, all and last"):
        variants("checkpoint: 70")
    with pytest.raises(ValueError, match="set save_every of Train Options"):
        make_variants((OWN,), parse_axis("checkpoint: all"), None, LoRAFiles(find, lambda name: {}))


def test_settings_of_generation_have_their_types() -> None:
    ten, _ = variants("steps: 10, 20", "sampler: euler, dpmpp_2m")[:2]
    assert ten.loras == (STYLE, OWN)
    config = ten.config(CONFIG)
    assert (config.steps, config.sampler, config.prompt) == (10, "euler", "a cat")
    on, off = variants("vae_tiling: on, off")
    assert (on.config(CONFIG).vae_tiling, off.config(CONFIG).vae_tiling) == (True, False)
    with pytest.raises(ValueError, match="variant steps many: steps is 'many': give a whole number"):
        variants("steps: many")[0].config(CONFIG)


@pytest.mark.parametrize(
    ("columns", "rows", "stack", "message"),
    [
        ("strength: 1", "strength: 2", (OWN,), "rows and columns both change strength"),
        ("strength: 1", "", (), "changes the last LoRA of lora_stack, which has none"),
        ("strength: much", "", (OWN,), "the axis strength has the value 'much': give numbers"),
    ],
)
def test_axes_that_do_not_fit_are_refused(columns: str, rows: str, stack: tuple[LoRARef, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants(columns, rows, stack)
    with pytest.raises(FileNotFoundError):
        variants("lora: missing")


def test_settings_of_a_variant() -> None:
    assert read_settings("steps=20,\nsampler = euler", "mine") == {"steps": "20", "sampler": "euler"}
    assert read_settings("", "mine") == {}
    for text in ("steps", "seed=1", "colour=red"):
        with pytest.raises(ValueError, match=f"variant mine: '{text}' is not a setting of generation"):
            read_settings(text, "mine")


def test_names() -> None:
    assert stack_name([LoRARef(Path(), "sub/style.safetensors", 0.5, 0.25, "mid_block=0"), OWN]) == (
        "style at 0.5/0.25 (mid_block=0) + own"
    )
    assert stack_name([]) == "base"
    with pytest.raises(ValueError, match="two variants are called 'base'"):
        require_distinct([Variant("base"), Variant("x"), Variant("base")])
