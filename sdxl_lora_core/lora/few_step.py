"""Recognises LoRAs for few-step sampling by their names, and gives the settings that their authors recommend."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Advice(NamedTuple):
    """Settings of SDXL Generate (cached). Sampler and scheduler are KSampler's names."""

    kind: str
    sampler: str
    scheduler: str
    steps: str
    guidance: str


# The first matching pattern applies. Sources: the model cards, and arXiv 2311.05556 (LCM), 2402.13929 (Lightning),
# 2404.13686 (Hyper-SD), 2402.19159 (TCD), 2405.14867 (DMD2).
_KINDS: tuple[tuple[str, Advice], ...] = (
    (r"hyper[-_ ]?sd.*cfg", Advice("Hyper-SD with guidance", "ddim", "sgm_uniform", "8 to 12", "5 to 8")),
    (r"hyper[-_ ]?sd.*(?<!\d)1[-_ ]?steps?", Advice("Hyper-SD", "tcd", "sgm_uniform", "1 to 8", "1")),
    (r"hyper[-_ ]?sd", Advice("Hyper-SD", "ddim", "sgm_uniform", "2 to 8", "1")),
    (
        r"sdxl[-_ ]?lightning|lightning[-_ ]?\d{1,2}[-_ ]?steps?|(?<!\d)\d{1,2}[-_ ]?steps?[-_ ]?lightning",
        Advice("SDXL-Lightning", "euler", "sgm_uniform", "4 to 8", "1"),
    ),
    (r"dmd[-_ ]?2", Advice("DMD2", "lcm", "sgm_uniform", "4", "1")),
    (r"(?<![a-z])tcd(?![a-z])", Advice("TCD", "tcd", "sgm_uniform", "4 to 8", "1")),
    (r"(?<![a-z])lcm(?![a-z])|latent[-_ ]consistency", Advice("LCM", "lcm", "sgm_uniform", "4 to 8", "1 to 2")),
)
_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")
_TITLES = ("ss_output_name", "modelspec.title")


def advice(name: str, metadata: Mapping[str, str]) -> Advice | None:
    """The recommended settings for a file, or None. A number of steps in its name is the one it was made for."""
    for text in (name.removesuffix(".safetensors"), *(metadata.get(title, "") for title in _TITLES)):
        words = text.lower()
        for pattern, found in _KINDS:
            if re.search(pattern, words):
                steps = _STEPS.search(words)
                many = found.kind == "Hyper-SD" and found.sampler == "tcd"  # the 1-step LoRA takes more steps as well
                return found._replace(steps=steps[1]) if steps and not many else found
    return None
