"""Silences diffusers, transformers and the libraries they import while models are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides progress bars and warnings about missing or unknown tensors, for which the callers raise errors."""
    bitsandbytes_log = logging.getLogger("bitsandbytes")  # imported by them where it is installed
    bitsandbytes_level = bitsandbytes_log.level
    bitsandbytes_log.setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    levels = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    had_bar = transformers_log.is_progress_bar_enabled()
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        bitsandbytes_log.setLevel(bitsandbytes_level)
        diffusers_log.set_verbosity(levels[0])
        transformers_log.set_verbosity(levels[1])
        if had_bar:
            transformers_log.enable_progress_bar()
