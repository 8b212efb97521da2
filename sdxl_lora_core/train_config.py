"""Every setting of a training run. The nodes' widgets, the command line and run.yaml all read them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .adapter_checks import MAX_RANK, check_adapter, check_what_learns
from .sdxl.base import Override, PredictionOverride
from .sdxl.precision import Precision, WeightType
from .settings import MANY, MAX_SEED, SOMETHING, check_settings, fields_of, setting

TargetModules = Literal["attention", "attention+ff", "all-linear", "all-linear+conv"]
AdapterKind = Literal["lora", "dora", "loha", "lokr"]
AdapterInit = Literal["kaiming", "gaussian", "pissa"]
LRSchedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Optimizer = Literal[
    "adamw", "adamw_fused", "adamw8bit", "adafactor", "lion", "prodigy", "came", "schedule_free"
]  # fmt: skip
Checkpointing = Literal["auto", "off", "selective", "on"]
Loss = Literal["mse", "huber", "smooth_l1"]
TimestepSampling = Literal["uniform", "logit_normal"]
LoRAFormat = Literal["kohya", "peft"]
KeepBest = Literal["off", "validation_loss", "clip_score"]
TensorBoard = Literal["auto", "off"]
MOMENTUM_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name != "adafactor")
ADAM_LIKE_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name != "lion")
LAST_TIMESTEP = 999  # SDXL's noise schedule has 1000


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
        1e-4,
        "Size of each update. Lower it if images turn noisy or burnt, raise it if little is learned. "
        "Lion wants a fifth of the usual, Prodigy wants 1.",
        low=1e-8, high=1.0, step=1e-5, only_with=("train_unet", (True,)),
    )  # fmt: skip
    rank: int = setting(
        8, "Capacity of the LoRA. 4 to 16 for a style, 16 to 64 for much detail; file size grows with it.",
        low=1, high=MAX_RANK,
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
        "constant",
        "How the learning rate goes over the run: it stays, or falls to 0 along a line, a cosine (several with "
        "restarts) or a power of the line.",
    )
    lr_warmup_steps: int = setting(0, "The learning rate rises from 0 over this many steps.", low=0, high=MANY)
    target_modules: TargetModules = setting(
        "attention",
        "The layers that learn, of the UNet and of text encoders with a learning rate: attention is the usual choice, "
        "more layers learn more and make larger files.",
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
        "auto",
        "Less memory for more time. auto: as little as the memory allows; selective: about half the memory for "
        "little time; on: least memory, steps take a third longer.",
    )

    # Adapter
    adapter: AdapterKind = setting(
        "lora",
        "How the change of a layer is written. lora fits most; dora learns a little more, in up to twice the time; "
        "loha and lokr hold much change in small files, and ComfyUI reads them, diffusers does not.",
        group="adapter",
    )
    use_rslora: bool = setting(
        False, "Divides alpha by the root of the rank instead of the rank. For ranks above about 32, which learn too "
        "slowly otherwise; lora and dora only.",
        group="adapter",
    )  # fmt: skip
    rank_dropout: float = setting(
        0.0, "Share of each layer's outputs that learn nothing in a step, against overfitting; loha and lokr only.",
        low=0, high=0.9, step=0.05, group="adapter",
    )  # fmt: skip
    module_dropout: float = setting(
        0.0, "Share of the layers left out of a step, against overfitting; loha and lokr only.",
        low=0, high=0.9, step=0.05, group="adapter",
    )  # fmt: skip
    init: AdapterInit = setting(
        "kaiming",
        "Where a lora or dora starts. kaiming is usual; gaussian starts larger below rank 64; pissa starts at the "
        "base's own main directions, learns faster, and makes a file of twice the rank.",
        group="adapter",
    )
    blocks: str = setting(
        "", 'The UNet blocks that learn, such as "up_blocks.0.attentions.1" for style alone. Empty: all.',
        group="adapter", only_with=("train_unet", (True,)),
    )  # fmt: skip
    block_ranks: str = setting(
        "", 'Other ranks for some blocks, such as "up_blocks.0=16, mid_block=4"; alpha / rank stays as it is.',
        group="adapter", only_with=("train_unet", (True,)),
    )  # fmt: skip
    block_learning_rates: str = setting(
        "", 'Factors on the learning rate of some blocks, such as "down_blocks.1=0.5", where a block learns too much.',
        group="adapter", only_with=("train_unet", (True,)),
    )  # fmt: skip
    lora_plus_ratio: float = setting(
        1.0, "LoRA+: the up matrices learn this many times faster. Try 4 to 16 with half the learning rate, to get "
        "there in fewer steps; 1: off; lora and dora only.",
        low=1, high=100, step=1.0, group="adapter",
    )  # fmt: skip
    continue_from: str = setting(
        "", "A LoRA whose matrices are the start, to train it further. Same adapter, rank and target_modules.",
        group="adapter",
    )  # fmt: skip

    # Loss
    prediction: PredictionOverride = setting(
        "auto",
        "What the base predicts. auto: as its file says; set it for a v-prediction base whose file does not say so.",
        group="loss",
    )
    zero_terminal_snr: Override = setting(
        "auto",
        "Whether the base was trained down to pure noise. auto: as its file says; set it where the file does not.",
        group="loss",
    )
    loss: Loss = setting(
        "mse", "How an error counts. huber and smooth_l1 forgive large ones, such as watermarks and odd images.",
        group="loss",
    )  # fmt: skip
    huber_delta: float = setting(
        0.1, "Errors above this count linearly. Lower it to forgive more.",
        low=1e-4, high=10, step=0.01, group="loss", only_with=("loss", ("huber", "smooth_l1")),
    )  # fmt: skip
    snr_gamma: float = setting(
        0.0, "Min-SNR weighting: evens out the timesteps, learns faster. 5 is usual; 0 is off.",
        low=0, high=100, step=0.5, group="loss",
    )  # fmt: skip
    debiased: bool = setting(
        False, "Debiased estimation: noisy timesteps get more say. For composition and colours; replaces snr_gamma.",
        group="loss",
    )  # fmt: skip
    noise_offset: float = setting(
        0.0, "Noise that is equal over the whole image, for very dark or bright images. 0.03 to 0.1; 0 is off.",
        low=0, high=1, step=0.01, group="loss",
    )  # fmt: skip
    multires_noise_iterations: int = setting(
        0, "Coarser layers of noise, for large areas of light and dark. 6 to 10; 0 is off.",
        low=0, high=10, group="loss",
    )  # fmt: skip
    multires_noise_discount: float = setting(
        0.3, "Strength of each coarser layer of noise relative to the one before.",
        low=0, high=1, step=0.05, group="loss", only_with=("multires_noise_iterations", range(1, 11)),
    )  # fmt: skip
    input_perturbation: float = setting(
        0.0, "Noise that the UNet sees and is not asked for, against drift in sampling. 0.1 is usual; 0 is off.",
        low=0, high=1, step=0.01, group="loss",
    )  # fmt: skip
    timestep_min: int = setting(
        0, "First timestep to train. Raise it to leave out fine detail.", low=0, high=LAST_TIMESTEP, group="loss"
    )
    timestep_max: int = setting(
        LAST_TIMESTEP, "Last timestep to train. Lower it to leave out composition.",
        low=0, high=LAST_TIMESTEP, group="loss",
    )  # fmt: skip
    timestep_sampling: TimestepSampling = setting(
        "uniform", "How timesteps are drawn. logit_normal prefers those around logit_mean.", group="loss"
    )
    logit_mean: float = setting(
        0.0, "Where logit_normal has its middle: 0 the middle of the range, above 0 noisier, below 0 cleaner.",
        low=-5, high=5, step=0.1, group="loss", only_with=("timestep_sampling", ("logit_normal",)),
    )  # fmt: skip
    logit_std: float = setting(
        1.0, "How far logit_normal spreads. Lower keeps closer to the middle.",
        low=0.05, high=5, step=0.1, group="loss", only_with=("timestep_sampling", ("logit_normal",)),
    )  # fmt: skip

    # Optimizer
    optimizer: Optimizer = setting(
        "adamw",
        "adamw suits nearly all. adamw_fused is quicker on a GPU; adamw8bit, adafactor, lion and came need less "
        "memory; prodigy finds its learning rate; schedule_free needs no schedule.",
        group="optimizer",
    )
    adam_beta1: float = setting(
        0.9, "How long the mean gradient is remembered, of 1.",
        low=0, high=0.9999, group="optimizer", only_with=("optimizer", MOMENTUM_OPTIMIZERS),
    )  # fmt: skip
    adam_beta2: float = setting(
        0.999, "How long the squared gradient is remembered, of 1.",
        low=0, high=0.99999, group="optimizer", only_with=("optimizer", ADAM_LIKE_OPTIMIZERS),
    )  # fmt: skip
    weight_decay: float = setting(1e-2, "Pulls the LoRA's weights towards zero.", low=0, high=10, group="optimizer")
    max_grad_norm: float = setting(
        1.0, "Longer gradients are cut to this length. 0: never.", low=0, high=1e6, group="optimizer"
    )
    lr_cycles: int = setting(
        3, "How many times cosine_with_restarts starts again at the full learning rate, the first included.",
        low=1, high=1000, group="optimizer", only_with=("lr_schedule", ("cosine_with_restarts",)),
    )  # fmt: skip
    lr_power: float = setting(
        2.0, "The power of the polynomial schedule: 1 is the line, more falls sooner.",
        low=0.1, high=10, step=0.1, group="optimizer", only_with=("lr_schedule", ("polynomial",)),
    )  # fmt: skip
    ema_decay: float = setting(
        0.0, "Saves a moving average of the LoRA, which is steadier. 0.99 for short runs, 0.999 for long; 0 is off.",
        low=0, high=0.99999, step=0.001, group="optimizer",
    )  # fmt: skip

    # Captions
    shuffle_tags: bool = setting(
        False,
        "Shows the tags of a caption in changing order, so that no tag is learned for its place. "
        "For lists of tags, not for sentences.",
        group="captions",
    )
    keep_tags: int = setting(
        0, "The first tags of a caption, after the trigger word, that are never moved or left out.",
        low=0, high=1000, group="captions",
    )  # fmt: skip
    tag_dropout: float = setting(
        0.0, "Share of the tags left out at random, so that the LoRA does not need all of them in a prompt.",
        low=0, high=1, step=0.05, group="captions",
    )  # fmt: skip
    tag_separator: str = setting(",", "What stands between two tags in a caption.", group="captions")
    caption_variants: int = setting(
        8,
        "How many shuffled or thinned forms of each caption are encoded and drawn from. "
        "More are more varied; each takes about 0.3 MB of disk.",
        low=1, high=1000, group="captions",
    )  # fmt: skip
    caption_chunks: int = setting(
        1,
        "How much of a long caption is read: 1 is 75 tokens, 2 is 150, 3 is 225. "
        "Raise it when the report names captions that are cut.",
        low=1, high=3, group="captions",
    )  # fmt: skip
    masked_loss: bool = setting(
        False,
        "Learns only what the mask shows: the image of the same name in the dataset's masks folder (white is learned), "
        "or the image's own alpha channel.",
        group="captions",
    )
    prior_weight: float = setting(
        1.0, "How much regularisation images count beside training images.", low=0, high=10, step=0.1, group="captions"
    )
    class_prompt: str = setting(
        "",
        "What the trained subject is one of, 'a photo of a cat' for your cat. The base draws such images once and the "
        "training keeps them as they are. Unused where the dataset has regularisation images.",
        group="captions",
    )
    class_images: int = setting(
        0, "How many images are drawn from class_prompt. 0: one for each training image.",
        low=0, high=1000, group="captions",
    )  # fmt: skip

    # Watching
    epochs: int = setting(
        0, "Trains until every image was seen this often, repeats counted, instead of for `steps`. 0: steps count.",
        low=0, high=MANY, group="watch",
    )  # fmt: skip
    checkpoint_every: int = setting(
        250, "Steps between checkpoints. Lower it where a crash is likely.", low=1, high=MANY, group="watch"
    )
    validate_every: int = setting(
        0, "Steps between measurements of the loss on held-out images. 0: only before and after the training.",
        low=0, high=MANY, group="watch",
    )  # fmt: skip
    early_stopping: int = setting(
        0, "Stops when so many validations in a row bring no lower loss. 3 to 5 is usual; 0: never.",
        low=0, high=1000, group="watch",
    )  # fmt: skip
    keep_best: KeepBest = setting(
        "off",
        "What the file holds: off, the last step; otherwise the step with the lowest validation loss, or with the "
        "highest mean CLIP score of the samples.",
        group="watch",
    )
    sample_every: int = setting(
        0, "Steps between samples while it trains: each costs an image's generation a prompt. 0: only at the end.",
        low=0, high=MANY, group="watch",
    )  # fmt: skip
    clip_model: str = setting(
        "", "CLIP model that scores the samples, by its name on the CLIP Score node. Without one they get no score.",
        group="watch", only_with=("sample_prompts", SOMETHING),
    )  # fmt: skip
    tensorboard: TensorBoard = setting(
        "auto", "auto: event files in the run folder if tensorboard is installed. off: never.", group="watch"
    )
    sample_steps: int = setting(
        25, "Denoising steps of a sample. Fewer are faster and rougher.",
        low=1, high=200, group="watch", only_with=("sample_prompts", SOMETHING),
    )  # fmt: skip
    sample_guidance: float = setting(
        7.0, "Guidance scale of a sample. Take the one that you generate with.",
        low=0, high=50, group="watch", only_with=("sample_prompts", SOMETHING),
    )  # fmt: skip

    # Memory
    images_per_pass: int = setting(
        0, "Images that go through the UNet at once, at most batch_size; the update stays the same. 0: as many as fit.",
        low=0, high=256, group="memory",
    )  # fmt: skip
    memory_limit_gb: float = setting(
        0.0, "The run is planned for this much memory; for where other programs will need some. 0: all that is free.",
        low=0, high=4096, step=0.5, group="memory",
    )  # fmt: skip

    deterministic: bool = setting(
        False,
        "The same bits on a GPU every time, at some cost in speed, to repeat or compare runs there. On the CPU they "
        "always are.",
        group="memory",
    )

    # The file
    save_format: LoRAFormat = setting(
        "kohya",
        "Names in the file: kohya for ComfyUI, A1111 and most others; peft for diffusers and peft, whose names "
        "ComfyUI's own loader reads only in part.",
        group="adapter",
    )  # fmt: skip
    save_dtype: WeightType = setting("fp16", "Number format of the saved LoRA.", group="adapter")

    # Text encoders and new tokens
    train_unet: bool = setting(
        True, "Off: the UNet stays as it is, and only text encoders or new tokens learn.", group="adapter"
    )
    text_encoder_learning_rate: float = setting(
        0.0,
        "Learning rate of a LoRA on the first text encoder (CLIP-L), for words that it misreads; half of learning_rate "
        "is usual. It then reads the captions in every step instead of once. 0: it stays as it is.",
        low=0, high=1, step=1e-5, group="adapter",
    )  # fmt: skip
    text_encoder_2_learning_rate: float = setting(
        0.0,
        "The same for the second, larger text encoder (OpenCLIP-G), which needs 1.4 GB more. 0: it stays as it is.",
        low=0, high=1, step=1e-5, group="adapter",
    )  # fmt: skip
    new_tokens: str = setting(
        "",
        "Words that both text encoders learn (textual inversion), such as 'ohwx=cat', which starts as cat, or 'ohwx', "
        "which starts at random. For what no word describes; the captions have to hold them.",
        group="captions",
    )
    vectors_per_token: int = setting(
        1, "How many vectors each new token has. 2 to 8 hold more detail, and take as many tokens of a prompt.",
        low=1, high=75, group="captions", only_with=("new_tokens", SOMETHING),
    )  # fmt: skip
    token_learning_rate: float = setting(
        1e-3, "Learning rate of the new tokens. Lower it if images with them turn strange.",
        low=1e-8, high=1, step=1e-4, group="captions", only_with=("new_tokens", SOMETHING),
    )  # fmt: skip

    # What a run is called, how long it lasts and what is shown of it does not change a single step.
    OUTSIDE_FINGERPRINT = (
        "lora_name", "steps", "epochs", "sample_prompts", "sample_steps", "sample_guidance",
        "checkpoint_every", "save_format", "save_dtype",
        "validate_every", "early_stopping", "keep_best", "sample_every", "clip_model", "tensorboard",
    )  # fmt: skip

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates that something learns at, by setting."""
        rates = {
            "learning_rate": self.learning_rate if self.train_unet else 0,
            "text_encoder_learning_rate": self.text_encoder_learning_rate,
            "text_encoder_2_learning_rate": self.text_encoder_2_learning_rate,
            "token_learning_rate": self.token_learning_rate if self.new_tokens else 0,
        }
        return {option: rate for option, rate in rates.items() if rate}

    @property
    def leading_rate(self) -> float:
        """The one that is shown and scheduled; all others are factors of it."""
        return next(iter(self.rates.values()))

    def __post_init__(self) -> None:
        check_settings(self)
        check_adapter(self)
        check_what_learns(self)
        _check_loss(self)
        _check_optimizer(self)
        _check_captions(self)
        _check_watching(self)
        _check_memory(self)
        if self.epochs == 0 and self.lr_warmup_steps >= self.steps and self.lr_warmup_steps > 0:
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


def _check_loss(config: TrainConfig) -> None:
    if config.snr_gamma and config.debiased:
        raise ValueError(
            f"snr_gamma is {config.snr_gamma} and debiased is on: both weigh the timesteps, so turn one of them off"
        )
    if config.noise_offset and config.multires_noise_iterations:
        raise ValueError(
            f"noise_offset is {config.noise_offset} and multires_noise_iterations is "
            f"{config.multires_noise_iterations}: both add coarse noise, so set one of them to 0"
        )
    if config.timestep_min > config.timestep_max:
        raise ValueError(
            f"timestep_min is {config.timestep_min} and timestep_max is {config.timestep_max}: leave a timestep between"
        )


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer == "prodigy" and config.leading_rate < 0.1:
        raise ValueError(
            f"optimizer is 'prodigy' and {next(iter(config.rates))} is {config.leading_rate}: it finds its own rate "
            "and multiplies it with this one, so set it to 1"
        )
    if config.optimizer != "schedule_free":
        return
    if config.lr_schedule != "constant":
        raise ValueError(
            f"optimizer is 'schedule_free' and lr_schedule is {config.lr_schedule!r}: its averaging takes the place "
            "of a schedule, so set lr_schedule to constant"
        )
    if config.ema_decay:
        raise ValueError(
            f"optimizer is 'schedule_free' and ema_decay is {config.ema_decay}: it averages by itself, so set "
            "ema_decay to 0"
        )
    if config.adam_beta1 == 0:
        raise ValueError("optimizer is 'schedule_free' and adam_beta1 is 0: it needs a value above 0, 0.9 is usual")


def _check_captions(config: TrainConfig) -> None:
    if not config.tag_separator:
        raise ValueError("tag_separator is empty: give what stands between two tags, a comma for example")
    if config.keep_tags and not (config.shuffle_tags or config.tag_dropout):
        raise ValueError(
            f"keep_tags is {config.keep_tags} and shuffle_tags is off, tag_dropout 0: all tags stay as they are, so "
            "turn one of them on or set keep_tags to 0"
        )
    for option in ("caption_variants", "tag_separator"):
        is_set = getattr(config, option) != fields_of(config)[option].default
        if is_set and not (config.shuffle_tags or config.tag_dropout):
            raise ValueError(
                f"{option} is {getattr(config, option)!r} and shuffle_tags is off, tag_dropout 0: captions stay whole, "
                f"so turn one of them on, or set {option} back"
            )
    if config.class_images and not config.class_prompt:
        raise ValueError(
            f"class_images is {config.class_images} and class_prompt is empty: say what they show, or set it to 0"
        )


def _check_memory(config: TrainConfig) -> None:
    if config.images_per_pass > config.batch_size:
        raise ValueError(
            f"images_per_pass is {config.images_per_pass} and batch_size is {config.batch_size}: a pass holds a batch "
            "at most, so lower it, or raise batch_size"
        )


def _check_watching(config: TrainConfig) -> None:
    """What looks at the run has to be looked with."""
    if config.early_stopping and not config.validate_every:
        raise ValueError(
            f"early_stopping is {config.early_stopping} and validate_every is 0: set validate_every to the steps "
            "between two validations"
        )
    if config.keep_best == "validation_loss" and not config.validate_every:
        raise ValueError(
            "keep_best is 'validation_loss' and validate_every is 0: set validate_every to the steps between two "
            "validations"
        )
    if config.sample_every and not config.sample_prompts:
        raise ValueError(
            f"sample_every is {config.sample_every} and sample_prompts is empty: give prompts, or set sample_every to 0"
        )
    if config.keep_best == "clip_score" and not (config.sample_every and config.clip_model):
        raise ValueError(
            f"keep_best is 'clip_score', sample_every is {config.sample_every} and clip_model is "
            f"{config.clip_model!r}: set both, so that there are samples and they have a score"
        )
