"""Which settings of an adapter contradict each other; checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .new_tokens import tokens_of
from .sdxl.blocks import WITH_ATTENTION, lies_in, read_block_values, read_blocks
from .settings import fields_of

if TYPE_CHECKING:
    from .train_config import TrainConfig

MAX_RANK = 1024
_LOHA_LOKR = ("loha", "lokr")
_OF_LORAS = (
    "rank", "alpha", "target_modules", "dropout", "adapter", "use_rslora", "rank_dropout", "module_dropout", "init",
    "lora_plus_ratio", "save_dtype",
)  # fmt: skip


def check_adapter(config: TrainConfig) -> None:
    """Raises ValueError naming the two settings that cannot go together, or the one that cannot be read."""
    _check_kind(config)
    _check_start(config)
    _check_blocks(config)


def check_what_learns(config: TrainConfig) -> None:
    """Raises ValueError if nothing learns, if new tokens cannot be read, or if Prodigy is to find several rates."""
    tokens_of(config)
    if not config.rates:
        raise ValueError(
            "train_unet is off and nothing else learns: turn it on, give a text encoder a learning rate, or name "
            "new_tokens"
        )
    if list(config.rates) == ["token_learning_rate"]:
        _refuse_settings_of_loras(config)
    own_rates = config.block_learning_rates or config.lora_plus_ratio != 1
    if config.optimizer == "prodigy" and (own_rates or len(set(config.rates.values())) > 1):
        shown = ", ".join(f"{option} {rate:g}" for option, rate in config.rates.items())
        raise ValueError(
            f"optimizer is 'prodigy', which finds one rate for all, and there are several ({shown}, "
            f"block_learning_rates {config.block_learning_rates!r}, lora_plus_ratio {config.lora_plus_ratio:g}): "
            "make them equal, or choose another optimizer"
        )


def _refuse_settings_of_loras(config: TrainConfig) -> None:
    for name, field in fields_of(config).items():
        if name in _OF_LORAS and getattr(config, name) != field.default:
            raise ValueError(
                f"{name} is {getattr(config, name)} and only new_tokens learn, without a LoRA: set it back to "
                f"{field.default}, or let the UNet or a text encoder learn"
            )


def _check_kind(config: TrainConfig) -> None:
    lycoris = config.adapter in _LOHA_LOKR
    only_lora = {
        "dropout": config.dropout > 0,
        "use_rslora": config.use_rslora,
        "lora_plus_ratio": config.lora_plus_ratio != 1,
        "init": config.init != "kaiming",
        "save_format": config.save_format != "kohya",
    }
    only_lycoris = {"rank_dropout": config.rank_dropout > 0, "module_dropout": config.module_dropout > 0}
    for option, is_set in (only_lora if lycoris else only_lycoris).items():
        if is_set:
            wanted = "lora or dora" if lycoris else "loha or lokr"
            value = getattr(config, option)
            raise ValueError(
                f"{option} is {value} and adapter is {config.adapter}, which has no {option}: "
                f"take adapter {wanted}, or leave {option} at its default"
            )


def _check_start(config: TrainConfig) -> None:
    if config.init == "pissa" and config.target_modules == "all-linear+conv":
        raise ValueError(
            "init is pissa and target_modules is all-linear+conv: PiSSA splits matrices, not kernels; take all-linear"
        )
    if config.continue_from and config.init != "kaiming":
        raise ValueError(
            f"init is {config.init} and continue_from is set, whose matrices are the start: leave init at kaiming"
        )


def _check_blocks(config: TrainConfig) -> None:
    blocks = read_blocks("blocks", config.blocks)
    ranks = read_block_values("block_ranks", config.block_ranks, 1, MAX_RANK)
    rates = read_block_values("block_learning_rates", config.block_learning_rates, 1e-3, 1e3)
    for block, rank in ranks.items():
        if rank != int(rank):
            raise ValueError(f"block_ranks gives {block} {rank:g}: a rank is a whole number")
    for option, named in (("blocks", blocks), ("block_ranks", ranks), ("block_learning_rates", rates)):
        for block in named:
            if blocks and not any(lies_in(block, [other]) or lies_in(other, [block]) for other in blocks):
                raise ValueError(f"{option} names {block} and blocks, {config.blocks}, leaves it out: drop it in one")
            if config.target_modules != "all-linear+conv" and block not in WITH_ATTENTION:
                raise ValueError(
                    f"{option} names {block} and target_modules is {config.target_modules}, which has no layer "
                    "there: take all-linear+conv, or another block"
                )
