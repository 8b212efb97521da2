"""Every setting of a training run. The nodes' widgets, the command line and run.yaml all read them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .settings import check_settings, setting

Precision = Literal["auto", "bf16", "fp16", "fp32"]
TargetModules = Literal["attention", "attention+ff", "all-linear", "all-linear+conv"]
LRSchedule = Literal["constant", "linear", "cosine"]
Checkpointing = Literal["auto", "on", "off"]
LoRAFormat = Literal["kohya", "peft"]
WeightType = Literal["fp16", "bf16", "fp32"]

MAX_SEED = 2**64 - 1
MANY = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. steps are optimizer updates; each sees batch_size x gradient_accumulation images."""

    # On the face of the node
    lora_name: str = setting(
        "my_lora", "File name of the LoRA. If another LoRA has it, a number is appended; nothing is overwritten."
    )
    steps: int = setting(
        1000, "Number of weight updates. About 50 to 100 per image is a usual start.", low=1, high=MANY
    )
    learning_rate: float = setting(
        1e-4, "Size of each update. Lower it if images turn noisy or burnt, raise it if little is learned.",
        low=1e-8, high=1.0, step=1e-5,
    )  # fmt: skip
    rank: int = setting(
        8, "Capacity of the LoRA. 4 to 16 for a style, 16 to 64 for much detail; file size grows with it.",
        low=1, high=1024,
    )  # fmt: skip
    alpha: float = setting(
        16.0, "The LoRA acts with alpha / rank. Larger learns faster, like a larger learning rate.",
        low=1e-3, high=4096, step=1.0,
    )  # fmt: skip
    batch_size: int = setting(1, "Images per pass. More is steadier and needs more memory.", low=1, high=256)
    seed: int = setting(
        0, "Decides the start values, the order of images and the noise. The same seed repeats a run.",
        low=0, high=MAX_SEED,
    )  # fmt: skip
    sample_prompts: tuple[str, ...] = setting((), "One prompt a line; the finished LoRA draws each once. Empty: none.")

    # Advanced inputs of the node
    gradient_accumulation: int = setting(
        1, "Passes per update: acts like a larger batch without its memory.", low=1, high=1024
    )
    lr_schedule: LRSchedule = setting(
        "constant", "How the learning rate goes over the run: it stays, falls linearly, or falls along a cosine."
    )
    lr_warmup_steps: int = setting(0, "The learning rate rises from 0 over this many steps.", low=0, high=MANY)
    target_modules: TargetModules = setting(
        "attention",
        "The UNet layers that learn: attention is the usual choice, more layers learn more and make larger files.",
    )
    dropout: float = setting(
        0.0, "Share of the LoRA's inputs left out at random in training, against overfitting.",
        low=0, high=0.9, step=0.05,
    )  # fmt: skip
    caption_dropout: float = setting(
        0.0, "Share of training images shown without their caption.", low=0, high=1, step=0.05
    )
    precision: Precision = setting(
        "auto",
        "Number format of the frozen weights while training; the LoRA itself learns in fp32. "
        "auto: bf16 or fp16 on a GPU, fp32 on the CPU.",
    )
    gradient_checkpointing: Checkpointing = setting(
        "auto", "Less memory for more time. auto: only where the memory is too small otherwise."
    )

    # Adapter

    # Loss

    # Optimizer
    adam_beta1: float = setting(0.9, "AdamW's decay of the mean gradient.", low=0, high=0.9999)
    adam_beta2: float = setting(0.999, "AdamW's decay of the squared gradient.", low=0, high=0.99999)
    weight_decay: float = setting(1e-2, "Pulls the LoRA's weights towards zero.", low=0, high=10)
    max_grad_norm: float = setting(1.0, "Longer gradients are cut to this length. 0: never.", low=0, high=1e6)

    # Captions

    # Watching
    checkpoint_every: int = setting(250, "Steps between checkpoints.", low=1, high=MANY)
    sample_steps: int = setting(25, "Denoising steps of a sample.", low=1, high=200)
    sample_guidance: float = setting(7.0, "Guidance scale of a sample.", low=0, high=50)

    # Memory

    # The file
    save_format: LoRAFormat = setting("kohya", "kohya for ComfyUI, A1111 and most others; peft for diffusers and peft.")
    save_dtype: WeightType = setting("fp16", "Number format of the saved LoRA.")

    # What a run is called, how long it lasts and what is shown of it does not change a single step.
    OUTSIDE_FINGERPRINT = (
        "lora_name", "steps", "sample_prompts", "sample_steps", "sample_guidance",
        "checkpoint_every", "save_format", "save_dtype",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.lr_warmup_steps >= self.steps and self.lr_warmup_steps > 0:
            raise ValueError(
                f"lr_warmup_steps is {self.lr_warmup_steps} and steps is {self.steps}: the warm-up has to end before"
            )
        if (
            not self.lora_name
            or set(self.lora_name) & set('/\\<>:"|?*')
            or self.lora_name.strip(" .") != self.lora_name
        ):
            raise ValueError(
                f'lora_name is {self.lora_name!r}: give a plain file name without slashes or any of <>:"|?*'
            )
