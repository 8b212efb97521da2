"""The settings of the adapter: its kind, its layers and how it is initialised and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.blocks import WITH_ATTENTION, is_in_block, read_block_values, read_blocks
from ...sdxl.family import Part
from ...sdxl.precision import WeightType
from ...settings import Range, setting

MAX_RANK = 1024
_LOHA_LOKR = ("loha", "lokr")
TargetModules = Literal["attention", "attention+ff", "all-linear", "all-linear+conv"]
AdapterKind = Literal["lora", "dora", "loha", "lokr"]
AdapterInit = Literal["kaiming", "gaussian", "pissa"]
LoRAFormat = Literal["kohya", "peft"]


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter: its kind and rank, the layers it is on, how it is initialised and saved."""

    rank: int = setting(
        8,
        "Capacity of the LoRA. 4 to 16 for a style, 16 to 64 for a lot of detail; the file size is proportional to it.",
        Range(1, MAX_RANK),
    )
    alpha: float = setting(
        16.0,
        "The LoRA is scaled by alpha / rank. A larger alpha learns faster, like a larger learning rate.",
        Range(1e-3, 4096, step=1.0),
    )
    target_modules: TargetModules = setting(
        "attention",
        "The layers that are trained, in the UNet and in text encoders that have a learning rate. attention is the "
        "usual choice; more layers learn more and make larger files.",
    )
    dropout: float = setting(
        0.0, "Dropout on the inputs of the LoRA layers, against overfitting.", Range(0, 0.9, step=0.05)
    )
    adapter: AdapterKind = setting(
        "lora",
        "How the change of a layer is parametrised. lora suits most cases; dora learns a little more in up to twice "
        "the time; loha and lokr fit large changes into small files, which ComfyUI reads and diffusers does not.",
    )
    use_rslora: bool = setting(
        False,
        "rsLoRA: scales by alpha / sqrt(rank) instead of alpha / rank. For ranks above about 32, which otherwise "
        "learn too slowly; lora and dora only.",
    )
    rank_dropout: float = setting(
        0.0,
        "Share of each layer's output rows dropped in a step, against overfitting; loha and lokr only.",
        Range(0, 0.9, step=0.05),
    )
    module_dropout: float = setting(
        0.0,
        "Share of the layers skipped in a step, against overfitting; loha and lokr only.",
        Range(0, 0.9, step=0.05),
    )
    init: AdapterInit = setting(
        "kaiming",
        "Initial values of a lora or dora. kaiming is usual; gaussian is larger below rank 64; pissa takes the "
        "principal components of the base's weights, learns faster, and its file has twice the rank.",
    )
    blocks: str = setting(
        "",
        'The UNet blocks that are trained, such as "up_blocks.0.attentions.1" for style only. Empty: all.',
        only_with={"train_unet": (True,)},
    )
    block_ranks: str = setting(
        "",
        'Ranks of single blocks, such as "up_blocks.0=16, mid_block=4"; alpha / rank stays the same.',
        only_with={"train_unet": (True,)},
    )
    block_learning_rates: str = setting(
        "",
        'Factors on the learning rate of single blocks, such as "down_blocks.1=0.5" for one that learns too much.',
        only_with={"train_unet": (True,)},
    )
    lora_plus_ratio: float = setting(
        1.0,
        "LoRA+: factor on the learning rate of the up matrices. Try 4 to 16 with half the learning rate to need "
        "fewer steps; 1 is off; lora and dora only.",
        Range(1, 100, step=1.0),
    )
    continue_from: str = setting("", "A LoRA to train further. It needs the same adapter, rank and target_modules.")
    save_format: LoRAFormat = setting(
        "kohya",
        "Key names in the file: kohya for ComfyUI, A1111 and most other programs; peft for diffusers and peft, whose "
        "names ComfyUI's own loader reads only in part.",
    )
    save_dtype: WeightType = setting("fp16", "Number format of the saved LoRA.")
    train_unet: bool = setting(True, "Off: the UNet is not trained, only text encoders or new tokens are.")
    text_encoder_learning_rate: float = setting(
        0.0,
        "Learning rate of a LoRA on the first text encoder (CLIP-L), for words it does not understand; half of "
        "learning_rate is usual. It then encodes the captions in every step instead of once. 0: not trained.",
        Range(0, 1, step=1e-5),
    )
    text_encoder_2_learning_rate: float = setting(
        0.0,
        "The same for the second, larger text encoder (OpenCLIP-G), which needs 1.4 GB more. 0: not trained.",
        Range(0, 1, step=1e-5),
    )


def check_adapter(settings: AdapterSettings) -> None:
    """Raises ValueError naming two settings that contradict each other, or one that cannot be parsed."""
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
                f"choose adapter {wanted}, or leave {option} at its default"
            )


def _check_start(settings: AdapterSettings) -> None:
    if settings.init == "pissa" and settings.target_modules == "all-linear+conv":
        raise ValueError(
            "init is pissa and target_modules is all-linear+conv: PiSSA is not defined for convolutions; choose "
            "all-linear"
        )
    if settings.continue_from and settings.init != "kaiming":
        raise ValueError(
            f"init is {settings.init} and continue_from is set, which gives the initial values: leave init at kaiming"
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
            if blocks and not any(is_in_block(block, [other]) or is_in_block(other, [block]) for other in blocks):
                raise ValueError(
                    f"{option} names {block}, which blocks ({settings.blocks}) excludes: change one of them"
                )
            if settings.target_modules != "all-linear+conv" and block not in WITH_ATTENTION:
                raise ValueError(
                    f"{option} names {block} and target_modules is {settings.target_modules}, which has no layers "
                    "there: choose all-linear+conv, or another block"
                )


def encoder_rate(settings: AdapterSettings, part: Part) -> float:
    """The learning rate of a text encoder's adapter; 0 if it has none."""
    return settings.text_encoder_learning_rate if part == "text_encoder" else settings.text_encoder_2_learning_rate
