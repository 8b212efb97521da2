"""The parts of the service that need no server; tests/comfy/test_service.py asks a real one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.images.c2pa_signature import SigningError
from sdxl_lora_core.runtime.device import OutOfMemory
from tools.run_workflow import load_pack

PACK: Any = load_pack()
service, previews = PACK.nodes.host.service, PACK.nodes.previews


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutOfMemory("full"), 503),
        (torch.OutOfMemoryError("full"), 503),
        (MemoryError("full"), 503),
        (FileNotFoundError("gone"), 404),
        (ValueError("no"), 409),
        (OSError("disk"), 507),
        (PermissionError("disk"), 507),
        (SigningError("key"), 500),
        (KeyError("a fault of ours"), 500),
    ],
)
def test_an_errors_status(error: Exception, status: int) -> None:
    kind = type(error)
    name = f"{kind.__module__}.{kind.__name__}"  # as ComfyUI writes it
    with pytest.raises(PACK.nodes.host.requests.Refused) as refused:
        service._require_success([["execution_error", {"exception_type": name, "exception_message": str(error)}]])
    assert refused.value.status == status and str(error) in str(refused.value)


def test_a_wrong_length_of_the_queue_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SDXL_LORA_MOST_WAITING", "7")
    assert service._most_waiting() == 7 and not caplog.text
    monkeypatch.setenv("SDXL_LORA_MOST_WAITING", "-many")
    assert service._most_waiting() == 100 and "SDXL_LORA_MOST_WAITING is '-many'" in caplog.text


def preview(tmp_path: Path, shade: int) -> Path:
    image = np.full((8, 8, 3), shade, np.uint8)
    return tmp_path / "temp/sdxl_lora" / previews.show((), "", [image])["ui"]["images"][0]["filename"]


def test_previews_are_removed_an_hour_after_they_were_last_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    old, shown_again, new = (preview(tmp_path, shade) for shade in (0, 1, 2))
    for file in (old, shown_again):
        os.utime(file, (time.time() - 4000,) * 2)
    assert preview(tmp_path, 1) == shown_again
    cleaner = service._Previews()
    cleaner.remove_old()
    assert not old.exists() and shown_again.exists() and new.exists()
    assert preview(tmp_path, 0) == old and old.exists()
    os.utime(old, (time.time() - 4000,) * 2)
    cleaner.remove_old()
    assert old.exists(), "the folder is looked through once a minute"


def test_a_preview_that_could_not_be_written_is_written_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    whole = preview(tmp_path, 3).read_bytes()
    preview(tmp_path, 3).unlink()

    def half(file: Path, data: bytes) -> None:
        with file.open("wb") as handle:
            handle.write(data[:50])
        raise OSError(28, "no space left")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="no space left"):
            preview(tmp_path, 3)
    assert preview(tmp_path, 3).read_bytes() == whole
