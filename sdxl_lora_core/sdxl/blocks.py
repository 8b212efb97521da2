"""The blocks of SDXL's UNet by diffusers' names, and settings that list them: `up_blocks.0, mid_block`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..messages import shown

_STAGES_WITH_ATTENTION = {"down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 1, "up_blocks.0": 3, "up_blocks.1": 3}
_STAGES = ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")
WITH_ATTENTION = (
    *_STAGES_WITH_ATTENTION,
    *(f"{stage}.attentions.{number}" for stage, count in _STAGES_WITH_ATTENTION.items() for number in range(count)),
)
BLOCKS = (*_STAGES, *(block for block in WITH_ATTENTION if block not in _STAGES))


def read_blocks(option: str, text: str) -> tuple[str, ...]:
    """The block names in `text`. Raises ValueError naming `option` for an unknown or repeated one."""
    blocks = tuple(name.strip() for name in text.split(",") if name.strip())
    for block in blocks:
        if block not in BLOCKS:
            raise ValueError(f"{option} names {shown(block)}, which is not a block: use {', '.join(BLOCKS)}")
        if blocks.count(block) > 1:
            raise ValueError(f"{option} names {block} twice: keep one of them")
    return blocks


def read_block_values(option: str, text: str, low: float, high: float) -> dict[str, float]:
    """Parses `mid_block=4, up_blocks.0=16`. Inner blocks come first, so that the first match is the closest one.

    Raises ValueError naming `option` for a syntax error, an unknown block or a number outside low to high.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    blocks = read_blocks(option, ",".join(name for name, _, _ in pairs))
    values = {}
    for block, (_, _, number) in zip(blocks, pairs, strict=True):
        try:
            values[block] = float(number)
        except ValueError as error:
            raise ValueError(f"{option} is {shown(text)}: write block=number, such as {block}=4") from error
        if not low <= values[block] <= high:
            raise ValueError(f"{option} gives {block} {number.strip()}: give a value from {low:g} to {high:g}")
    return dict(sorted(values.items(), key=lambda item: -len(item[0])))


def is_in_block(module: str, blocks: Iterable[str]) -> bool:
    """Whether a module, by its diffusers path, or a block is in any of `blocks`."""
    return any(f"{module}.".startswith(f"{block}.") for block in blocks)


def value_for(module: str, values: Mapping[str, float], otherwise: float) -> float:
    """The value that applies to a module, by its diffusers path; `values` are those of read_block_values."""
    return next((value for block, value in values.items() if is_in_block(module, [block])), otherwise)
