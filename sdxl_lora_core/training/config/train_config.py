"""Every setting of a training run. The nodes' widgets, the command line and run.yaml all read them from here."""

from __future__ import annotations

from dataclasses import dataclass

from ...files import check_name
from ...sdxl.family import ENCODERS, Part
from ...settings import MAX_SEED, UNLIMITED, Range, check_settings, fields_of, setting
from .adapter import AdapterSettings, check_adapter, encoder_rate
from .captions import CaptionSettings, check_captions, tokens_of
from .loss import LossSettings, check_loss
from .memory import MemorySettings, check_memory
from .optimizer import OptimizerSettings, check_optimizer
from .watch import WatchSettings, check_watching

_OF_LORAS = (
    "rank",
    "alpha",
    "target_modules",
    "dropout",
    "adapter",
    "use_rslora",
    "rank_dropout",
    "module_dropout",
    "init",
    "lora_plus_ratio",
    "save_dtype",
)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The name, length and seed of a run."""

    lora_name: str = setting(
        "my_lora", "File name of the LoRA. If it is taken, a number is appended; nothing is overwritten."
    )
    steps: int = setting(
        1000, "Number of optimizer updates. 50 to 100 per image is a usual start.", Range(1, UNLIMITED)
    )
    seed: int = setting(
        0,
        "Seed of the initial values, the order of images and the noise. The same seed repeats a run.",
        Range(0, MAX_SEED),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    MemorySettings, WatchSettings, CaptionSettings, OptimizerSettings, LossSettings, AdapterSettings, RunSettings
):
    """One training run. `steps` are optimizer updates; each sees batch_size x gradient_accumulation images.

    It has all settings of the groups that it inherits from; a function that reads one group takes that group's type.
    dataclasses lists the fields of the last base class first.
    """

    # Settings that do not change a single training step.
    OUTSIDE_FINGERPRINT = (
        "lora_name",
        "steps",
        "epochs",
        "sample_prompts",
        "sample_steps",
        "sample_guidance",
        "checkpoint_every",
        "save_every",
        "image_losses",
        "save_format",
        "save_dtype",
        "validate_every",
        "early_stopping",
        "keep_best",
        "sample_every",
        "clip_model",
        "tensorboard",
        "offload_blocks",
    )

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates in use, by setting."""
        rates = {
            "learning_rate": self.learning_rate if self.train_unet else 0,
            "text_encoder_learning_rate": self.text_encoder_learning_rate,
            "text_encoder_2_learning_rate": self.text_encoder_2_learning_rate,
            "token_learning_rate": self.token_learning_rate if self.new_tokens else 0,
        }
        return {option: rate for option, rate in rates.items() if rate}

    @property
    def leading_rate(self) -> float:
        """The learning rate that is displayed and scheduled; all others are proportional to it."""
        return next(iter(self.rates.values()))

    def __post_init__(self) -> None:
        check_settings(self)
        check_adapter(self)
        check_learning_rates(self)
        check_loss(self)
        check_optimizer(self)
        check_captions(self)
        check_watching(self)
        check_memory(self)
        if self.adapter == "dora" and self.base_weights != "full":
            raise ValueError(
                f"base_weights is {self.base_weights!r} and adapter is 'dora', which needs the base's own weights: set "
                "base_weights to full, or adapter to lora"
            )
        if self.epochs == 0 and self.lr_warmup_steps >= self.steps and self.lr_warmup_steps > 0:
            raise ValueError(
                f"lr_warmup_steps is {self.lr_warmup_steps} and steps is {self.steps}: the warm-up must be shorter"
            )
        check_name("lora_name", self.lora_name)


def check_learning_rates(config: TrainConfig) -> None:
    """Raises ValueError if nothing is trained, new_tokens is invalid, or Prodigy would need several learning rates."""
    tokens_of(config)
    if not config.rates:
        raise ValueError(
            "train_unet is off and nothing else is trained: turn it on, give a text encoder a learning rate, or set "
            "new_tokens"
        )
    if list(config.rates) == ["token_learning_rate"]:
        _reject_lora_settings(config)
    if config.optimizer == "prodigy":
        _check_prodigy(config)


def _check_prodigy(config: TrainConfig) -> None:
    if config.leading_rate < 0.1:
        raise ValueError(
            f"optimizer is 'prodigy' and {next(iter(config.rates))} is {config.leading_rate}: it multiplies "
            "this rate by its own, so set it to 1"
        )
    own_rates = config.block_learning_rates or config.lora_plus_ratio != 1
    if own_rates or len(set(config.rates.values())) > 1:
        shown = ", ".join(f"{option} {rate:g}" for option, rate in config.rates.items())
        raise ValueError(
            f"optimizer is 'prodigy', which finds one rate for all, and there are several ({shown}, "
            f"block_learning_rates {config.block_learning_rates!r}, lora_plus_ratio {config.lora_plus_ratio:g}): "
            "make them equal, or choose another optimizer"
        )


def _reject_lora_settings(config: TrainConfig) -> None:
    for name, field in fields_of(config).items():
        if name in _OF_LORAS and getattr(config, name) != field.default:
            raise ValueError(
                f"{name} is {getattr(config, name)} and only new_tokens are trained, without a LoRA: set it back to "
                f"{field.default}, or train the UNet or a text encoder"
            )


def learning_encoders(config: TrainConfig) -> tuple[Part, ...]:
    """The text encoders that run in every step: those with a learning rate; both if there are new tokens."""
    return tuple(part for part in ENCODERS if config.new_tokens or encoder_rate(config, part))
