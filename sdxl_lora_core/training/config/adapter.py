"""The adapter: what kind, on which layers, and which of its settings contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.blocks import WITH_ATTENTION, lies_in, read_block_values, read_blocks
from ...sdxl.loading import Part
from ...sdxl.precision import WeightType
from ...settings import setting

MAX_RANK = 1024
_LOHA_LOKR = ("loha", "lokr")
TargetModules = Literal["attention", "attention+ff", "all-linear", "all-linear+conv"]
AdapterKind = Literal["lora", "dora", "loha", "lokr"]
AdapterInit = Literal["kaiming", "gaussian", "pissa"]
LoRAFormat = Literal["kohya", "peft"]


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter: what kind, on which layers, how it starts, and how its file is written."""

    rank: int = setting(
        8,
        "Capacity of the LoRA. 4 to 16 for a style, 16 to 64 for much detail; file size grows with it.",
        low=1,
        high=MAX_RANK,
    )
    alpha: float = setting(
        16.0,
        "The LoRA acts with alpha / rank. Larger learns faster, like a larger learning rate.",
        low=1e-3,
        high=4096,
        step=1.0,
    )
    target_modules: TargetModules = setting(
        "attention",
        "The layers that learn, of the UNet and of text encoders with a learning rate: attention is the usual choice, "
        "more layers learn more and make larger files.",
    )
    dropout: float = setting(
        0.0,
        "Share of the LoRA's inputs left out at random in training, against overfitting.",
        low=0,
        high=0.9,
        step=0.05,
    )
    adapter: AdapterKind = setting(
        "lora",
        "How the change of a layer is written. lora fits most; dora learns a little more, in up to twice the time; "
        "loha and lokr hold much change in small files, and ComfyUI reads them, diffusers does not.",
        group="adapter",
    )
    use_rslora: bool = setting(
        False,
        "Divides alpha by the root of the rank instead of the rank. For ranks above about 32, which learn too "
        "slowly otherwise; lora and dora only.",
        group="adapter",
    )
    rank_dropout: float = setting(
        0.0,
        "Share of each layer's outputs that learn nothing in a step, against overfitting; loha and lokr only.",
        low=0,
        high=0.9,
        step=0.05,
        group="adapter",
    )
    module_dropout: float = setting(
        0.0,
        "Share of the layers left out of a step, against overfitting; loha and lokr only.",
        low=0,
        high=0.9,
        step=0.05,
        group="adapter",
    )
    init: AdapterInit = setting(
        "kaiming",
        "Where a lora or dora starts. kaiming is usual; gaussian starts larger below rank 64; pissa starts at the "
        "base's own main directions, learns faster, and makes a file of twice the rank.",
        group="adapter",
    )
    blocks: str = setting(
        "",
        'The UNet blocks that learn, such as "up_blocks.0.attentions.1" for style alone. Empty: all.',
        group="adapter",
        only_with=("train_unet", (True,)),
    )
    block_ranks: str = setting(
        "",
        'Other ranks for some blocks, such as "up_blocks.0=16, mid_block=4"; alpha / rank stays as it is.',
        group="adapter",
        only_with=("train_unet", (True,)),
    )
    block_learning_rates: str = setting(
        "",
        'Factors on the learning rate of some blocks, such as "down_blocks.1=0.5", where a block learns too much.',
        group="adapter",
        only_with=("train_unet", (True,)),
    )
    lora_plus_ratio: float = setting(
        1.0,
        "LoRA+: the up matrices learn this many times faster. Try 4 to 16 with half the learning rate, to get "
        "there in fewer steps; 1: off; lora and dora only.",
        low=1,
        high=100,
        step=1.0,
        group="adapter",
    )
    continue_from: str = setting(
        "",
        "A LoRA whose matrices are the start, to train it further. Same adapter, rank and target_modules.",
        group="adapter",
    )
    save_format: LoRAFormat = setting(
        "kohya",
        "Names in the file: kohya for ComfyUI, A1111 and most others; peft for diffusers and peft, whose names "
        "ComfyUI's own loader reads only in part.",
        group="adapter",
    )
    save_dtype: WeightType = setting("fp16", "Number format of the saved LoRA.", group="adapter")
    train_unet: bool = setting(
        True, "Off: the UNet stays as it is, and only text encoders or new tokens learn.", group="adapter"
    )
    text_encoder_learning_rate: float = setting(
        0.0,
        "Learning rate of a LoRA on the first text encoder (CLIP-L), for words that it misreads; half of learning_rate "
        "is usual. It then reads the captions in every step instead of once. 0: it stays as it is.",
        low=0,
        high=1,
        step=1e-5,
        group="adapter",
    )
    text_encoder_2_learning_rate: float = setting(
        0.0,
        "The same for the second, larger text encoder (OpenCLIP-G), which needs 1.4 GB more. 0: it stays as it is.",
        low=0,
        high=1,
        step=1e-5,
        group="adapter",
    )


def check_adapter(settings: AdapterSettings) -> None:
    """Raises ValueError naming the two settings that cannot go together, or the one that cannot be read."""
    _check_kind(settings)
    _check_start(settings)
    _check_blocks(settings)


def _check_kind(settings: AdapterSettings) -> None:
    lycoris = settings.adapter in _LOHA_LOKR
    only_lora = {
        "dropout": settings.dropout > 0,
        "use_rslora": settings.use_rslora,
        "lora_plus_ratio": settings.lora_plus_ratio != 1,
        "init": settings.init != "kaiming",
        "save_format": settings.save_format != "kohya",
    }
    only_lycoris = {"rank_dropout": settings.rank_dropout > 0, "module_dropout": settings.module_dropout > 0}
    for option, is_set in (only_lora if lycoris else only_lycoris).items():
        if is_set:
            wanted = "lora or dora" if lycoris else "loha or lokr"
            value = getattr(settings, option)
            raise ValueError(
                f"{option} is {value} and adapter is {settings.adapter}, which has no {option}: "
                f"take adapter {wanted}, or leave {option} at its default"
            )


def _check_start(settings: AdapterSettings) -> None:
    if settings.init == "pissa" and settings.target_modules == "all-linear+conv":
        raise ValueError(
            "init is pissa and target_modules is all-linear+conv: PiSSA splits matrices, not kernels; take all-linear"
        )
    if settings.continue_from and settings.init != "kaiming":
        raise ValueError(
            f"init is {settings.init} and continue_from is set, whose matrices are the start: leave init at kaiming"
        )


def _check_blocks(settings: AdapterSettings) -> None:
    blocks = read_blocks("blocks", settings.blocks)
    ranks = read_block_values("block_ranks", settings.block_ranks, 1, MAX_RANK)
    rates = read_block_values("block_learning_rates", settings.block_learning_rates, 1e-3, 1e3)
    for block, rank in ranks.items():
        if rank != int(rank):
            raise ValueError(f"block_ranks gives {block} {rank:g}: a rank is a whole number")
    for option, named in (("blocks", blocks), ("block_ranks", ranks), ("block_learning_rates", rates)):
        for block in named:
            if blocks and not any(lies_in(block, [other]) or lies_in(other, [block]) for other in blocks):
                raise ValueError(f"{option} names {block} and blocks, {settings.blocks}, leaves it out: drop it in one")
            if settings.target_modules != "all-linear+conv" and block not in WITH_ATTENTION:
                raise ValueError(
                    f"{option} names {block} and target_modules is {settings.target_modules}, which has no layer "
                    "there: take all-linear+conv, or another block"
                )


def encoder_rate(settings: AdapterSettings, part: Part) -> float:
    """The learning rate of a text encoder's adapter; 0: it has none."""
    return settings.text_encoder_learning_rate if part == "text_encoder" else settings.text_encoder_2_learning_rate
