"""The samplers and schedules, their valid combinations, and the libraries they need. Imports no library."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Sampler = Literal[
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "dpmpp_sde",
    "unipc",
    "euler",
    "euler_ancestral",
    "heun",
    "ddim",
    "ddpm",
    "pndm",
    "lcm",
    "tcd",
]
Schedule = Literal["karras", "normal", "exponential", "sgm_uniform", "beta", "ddim_uniform"]

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

# Solvers in sigmas accept any noise levels. The others step from one training level to another.
_SIGMAS: tuple[Schedule, ...] = ("karras", "normal", "exponential", "sgm_uniform", "beta")


@dataclass(frozen=True)
class Solver:
    """A sampler in diffusers: a scheduler class and its `options`; `eta` is an argument of its `step`.

    `own_range`: its noise levels span the training range whatever `timestep_spacing` is. `unet_calls` gives the number
    of UNet calls for n steps.
    """

    scheduler: str
    schedules: tuple[Schedule, ...] = _SIGMAS
    options: dict[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    own_range: bool = False
    calls_per_step: Literal[1, 2] = 1
    extra_call: bool = False

    def unet_calls(self, steps: int) -> int:
        """The last step of a second-order solver is of first order; PLMS starts with a step of second order."""
        return steps * self.calls_per_step - (self.calls_per_step - 1) + (self.extra_call and steps > 1)


def _multistep(algorithm: str, order: int) -> Solver:
    options = {"algorithm_type": algorithm, "solver_order": order}
    return Solver("DPMSolverMultistepScheduler", options=options, own_range=True)


# DPM-Solver++: Lu et al., arXiv 2211.01095; UniPC: Zhao et al., 2302.04867; Euler, Heun: Karras et al., 2206.00364;
# DDIM: Song et al., 2010.02502; DDPM: Ho et al., 2006.11239; PNDM, as PLMS: Liu et al., 2202.09778;
# LCM: Luo et al., 2310.04378; TCD: Zheng et al., 2402.19159, with the gamma that its authors use.
# LCM and TCD choose steps from a grid: the finest, of all 1000, gives evenly spaced ones that start at the last.
_UNCLIPPED = {"clip_sample": False}
SOLVERS: dict[Sampler, Solver] = {
    "dpmpp_2m": _multistep("dpmsolver++", 2),
    "dpmpp_2m_sde": _multistep("sde-dpmsolver++", 2),
    "dpmpp_3m": _multistep("dpmsolver++", 3),
    "dpmpp_sde": Solver("DPMSolverSDEScheduler", calls_per_step=2),
    "unipc": Solver("UniPCMultistepScheduler", own_range=True),
    "euler": Solver("EulerDiscreteScheduler"),
    "euler_ancestral": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler", calls_per_step=2),
    "ddim": Solver("DDIMScheduler", ("ddim_uniform", "sgm_uniform"), {**_UNCLIPPED, "set_alpha_to_one": False}),
    "ddpm": Solver("DDPMScheduler", ("ddim_uniform", "sgm_uniform", "normal"), _UNCLIPPED),
    "pndm": Solver("PNDMScheduler", ("ddim_uniform", "sgm_uniform"), {"skip_prk_steps": True}, extra_call=True),
    "lcm": Solver("LCMScheduler", ("sgm_uniform",), {"original_inference_steps": 1000}),
    "tcd": Solver("TCDScheduler", ("sgm_uniform",), {"original_inference_steps": 1000}, eta=0.3),
}


def require_pair(sampler: Sampler, schedule: Schedule) -> None:
    """Raises ValueError if the sampler does not support the schedule."""
    if schedule not in SOLVERS[sampler].schedules:
        raise ValueError(
            f"scheduler is {schedule!r}, which sampler {sampler!r} does not support: choose one of "
            f"{', '.join(SOLVERS[sampler].schedules)}, or another sampler"
        )


def require_libraries(sampler: Sampler, schedule: Schedule) -> None:
    """Raises ValueError with the pip command if the pair needs a library that is not installed. Imports nothing."""
    needs = {"sampler": (sampler, {"dpmpp_sde": "torchsde"}), "scheduler": (schedule, {"beta": "scipy"})}
    for option, (value, libraries) in needs.items():
        library = libraries.get(value)
        if library and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"{option} is {value!r}, which needs {library}: python -m pip install {library}, or choose "
                f"another {option}"
            )
