"""The settings of the training target, the noise and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.base import Override, PredictionOverride
from ...settings import Range, setting

Loss = Literal["mse", "huber", "smooth_l1"]
TimestepSampling = Literal["uniform", "logit_normal"]
LAST_TIMESTEP = 999  # SDXL's noise schedule has 1000


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The prediction type, the timesteps and noise of training, and the loss."""

    prediction: PredictionOverride = setting(
        "auto",
        "What the base predicts. auto: as stated in its file; set it for a v-prediction base whose file does not say "
        "so.",
    )
    zero_terminal_snr: Override = setting(
        "auto",
        "Whether the base was trained with zero terminal SNR. auto: as stated in its file; set it if it does not say "
        "so.",
    )
    loss: Loss = setting(
        "mse", "Loss function. huber and smooth_l1 are less sensitive to outliers, such as watermarks and odd images."
    )
    huber_delta: float = setting(
        0.1,
        "Errors above this are weighted linearly. Lower it to be less sensitive to outliers.",
        Range(1e-4, 10, step=0.01),
        only_with={"loss": ("huber", "smooth_l1")},
    )
    snr_gamma: float = setting(
        0.0,
        "Min-SNR loss weighting: balances the timesteps and learns faster. 5 is usual; 0 is off.",
        Range(0, 100, step=0.5),
    )
    debiased: bool = setting(
        False, "Debiased estimation: weights noisy timesteps more. For composition and colours; replaces snr_gamma."
    )
    noise_offset: float = setting(
        0.0,
        "Adds noise that is constant over the image, for very dark or bright images. 0.03 to 0.1; 0 is off.",
        Range(0, 1, step=0.01),
    )
    multires_noise_iterations: int = setting(
        0,
        "Multi-resolution noise: number of coarser noise layers, for large light and dark areas. 6 to 10; 0 is off.",
        Range(0, 10),
    )
    multires_noise_discount: float = setting(
        0.3,
        "Strength of each coarser noise layer relative to the previous one.",
        Range(0, 1, step=0.05),
        only_with={"multires_noise_iterations": range(1, 11)},
    )
    input_perturbation: float = setting(
        0.0,
        "Extra noise on the UNet's input that is not part of the target, against exposure bias. 0.1 is usual; 0 is "
        "off.",
        Range(0, 1, step=0.01),
    )
    timestep_min: int = setting(0, "First timestep to train. Raise it to exclude fine detail.", Range(0, LAST_TIMESTEP))
    timestep_max: int = setting(
        LAST_TIMESTEP, "Last timestep to train. Lower it to exclude composition.", Range(0, LAST_TIMESTEP)
    )
    timestep_sampling: TimestepSampling = setting(
        "uniform", "Distribution of the timesteps. logit_normal concentrates them around logit_mean."
    )
    logit_mean: float = setting(
        0.0,
        "Mean of logit_normal: 0 is the middle of the range, above 0 noisier, below 0 cleaner.",
        Range(-5, 5, step=0.1),
        only_with={"timestep_sampling": ("logit_normal",)},
    )
    logit_std: float = setting(
        1.0,
        "Standard deviation of logit_normal. Lower concentrates the timesteps more.",
        Range(0.05, 5, step=0.1),
        only_with={"timestep_sampling": ("logit_normal",)},
    )


def check_loss(settings: LossSettings) -> None:
    if settings.snr_gamma and settings.debiased:
        raise ValueError(
            f"snr_gamma is {settings.snr_gamma} and debiased is on: both weight the timesteps, so turn one of them off"
        )
    if settings.noise_offset and settings.multires_noise_iterations:
        raise ValueError(
            f"noise_offset is {settings.noise_offset} and multires_noise_iterations is "
            f"{settings.multires_noise_iterations}: both add coarse noise, so set one of them to 0"
        )
    if settings.timestep_min > settings.timestep_max:
        raise ValueError(
            f"timestep_min is {settings.timestep_min} and timestep_max is {settings.timestep_max}: no timestep is "
            "left, so lower timestep_min or raise timestep_max"
        )
