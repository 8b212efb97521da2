"""What the UNet is trained to predict, at which noise, and how errors count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.base import Override, PredictionOverride
from ...settings import setting

Loss = Literal["mse", "huber", "smooth_l1"]
TimestepSampling = Literal["uniform", "logit_normal"]
LAST_TIMESTEP = 999  # SDXL's noise schedule has 1000


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the base predicts, at which timesteps with which noise it is trained, and how errors count."""

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
        "mse",
        "How an error counts. huber and smooth_l1 forgive large ones, such as watermarks and odd images.",
        group="loss",
    )
    huber_delta: float = setting(
        0.1,
        "Errors above this count linearly. Lower it to forgive more.",
        low=1e-4,
        high=10,
        step=0.01,
        group="loss",
        only_with=("loss", ("huber", "smooth_l1")),
    )
    snr_gamma: float = setting(
        0.0,
        "Min-SNR weighting: evens out the timesteps, learns faster. 5 is usual; 0 is off.",
        low=0,
        high=100,
        step=0.5,
        group="loss",
    )
    debiased: bool = setting(
        False,
        "Debiased estimation: noisy timesteps get more say. For composition and colours; replaces snr_gamma.",
        group="loss",
    )
    noise_offset: float = setting(
        0.0,
        "Noise that is equal over the whole image, for very dark or bright images. 0.03 to 0.1; 0 is off.",
        low=0,
        high=1,
        step=0.01,
        group="loss",
    )
    multires_noise_iterations: int = setting(
        0,
        "Coarser layers of noise, for large areas of light and dark. 6 to 10; 0 is off.",
        low=0,
        high=10,
        group="loss",
    )
    multires_noise_discount: float = setting(
        0.3,
        "Strength of each coarser layer of noise relative to the one before.",
        low=0,
        high=1,
        step=0.05,
        group="loss",
        only_with=("multires_noise_iterations", range(1, 11)),
    )
    input_perturbation: float = setting(
        0.0,
        "Noise that the UNet sees and is not asked for, against drift in sampling. 0.1 is usual; 0 is off.",
        low=0,
        high=1,
        step=0.01,
        group="loss",
    )
    timestep_min: int = setting(
        0, "First timestep to train. Raise it to leave out fine detail.", low=0, high=LAST_TIMESTEP, group="loss"
    )
    timestep_max: int = setting(
        LAST_TIMESTEP,
        "Last timestep to train. Lower it to leave out composition.",
        low=0,
        high=LAST_TIMESTEP,
        group="loss",
    )
    timestep_sampling: TimestepSampling = setting(
        "uniform", "How timesteps are drawn. logit_normal prefers those around logit_mean.", group="loss"
    )
    logit_mean: float = setting(
        0.0,
        "Where logit_normal has its middle: 0 the middle of the range, above 0 noisier, below 0 cleaner.",
        low=-5,
        high=5,
        step=0.1,
        group="loss",
        only_with=("timestep_sampling", ("logit_normal",)),
    )
    logit_std: float = setting(
        1.0,
        "How far logit_normal spreads. Lower keeps closer to the middle.",
        low=0.05,
        high=5,
        step=0.1,
        group="loss",
        only_with=("timestep_sampling", ("logit_normal",)),
    )


def check_loss(settings: LossSettings) -> None:
    if settings.snr_gamma and settings.debiased:
        raise ValueError(
            f"snr_gamma is {settings.snr_gamma} and debiased is on: both weigh the timesteps, so turn one of them off"
        )
    if settings.noise_offset and settings.multires_noise_iterations:
        raise ValueError(
            f"noise_offset is {settings.noise_offset} and multires_noise_iterations is "
            f"{settings.multires_noise_iterations}: both add coarse noise, so set one of them to 0"
        )
    if settings.timestep_min > settings.timestep_max:
        raise ValueError(
            f"timestep_min is {settings.timestep_min} and timestep_max is {settings.timestep_max}: leave a timestep "
            "between"
        )
