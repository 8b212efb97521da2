"""Where the pack knows ComfyUI, and where it must not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_lora_core.sdxl.family import SDXL
from tests.nodes.fake_comfyui import fake_modules
from tools.run_workflow import ROOT, load_pack

host: Any = load_pack().nodes.host
COMFYUI = {path.stem for path in (ROOT / "stubs").iterdir()}


def imported(file: Path) -> Iterator[str]:
    """The first name of each module that a file imports by its full name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def test_only_the_host_imports_comfyui() -> None:
    knowing = {
        file.relative_to(ROOT).parent.as_posix()
        for room in ("nodes", "sdxl_lora_core")
        for file in (ROOT / room).rglob("*.py")
        if COMFYUI & set(imported(file))
    }
    assert knowing == {"nodes/host"}


def test_comfyui_beside_the_pack_is_not_comfyui_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("folder_paths", "server", "latent_preview"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    host.folders.add_output_folders()
    host.server.add_routes()
    assert host.folders.output_folder() == tmp_path and host.folders.cache_folders().root == tmp_path / "user/sdxl_lora"
    assert host.folders.roots("loras") == [tmp_path / "models/loras", tmp_path / "loras"]
    assert isinstance(host.comfy.nothing(), host.comfy.Nothing) and host.comfy.metadata({"a": 1}) == {"a": 1}
    assert not isinstance(host.memory._owner(), host.memory.ComfyParts)
    with host.progress.Progress() as progress:
        progress.on_estimate(torch.zeros(1, 4, 8, 8), SDXL)
        progress(1, 1, "training")


def test_the_folders_of_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, added = str(tmp_path / "moved"), []
    fake = SimpleNamespace(
        models_dir=str(tmp_path / "models"),
        folder_names_and_paths={"clip_score": ([moved], set()), "loras": (["a", "b"], set())},
        get_output_directory=lambda: "output",
        get_input_directory=lambda: "input",
        get_temp_directory=lambda: "temp",
        get_user_directory=lambda: str(tmp_path / "user"),
        get_filename_list=lambda folder_type: [f"{folder_type}/x"],
        add_model_folder_path=lambda folder_type, folder: added.append((folder_type, Path(folder))),
    )
    fake_modules(monkeypatch, {"folder_paths": fake})
    folders = host.folders
    assert (folders.output_folder(), folders.input_folder(), folders.temp_folder()) == (
        Path("output"),
        Path("input"),
        Path("temp"),
    )
    assert folders.roots("loras") == [Path("a"), Path("b")] and folders.roots("unknown") == []
    assert folders.roots("clip_score") == [Path(moved)], "extra_model_paths.yaml wins"
    assert folders.cache_folders().root == tmp_path / "user/sdxl_lora"
    assert folders.file_names("vae") == ["vae/x"]
    folders.add_output_folders()
    assert added == [("embeddings", Path("output/embeddings")), ("diffusers", Path("output/diffusers"))]


@pytest.mark.parametrize("announced", [True, False])
def test_a_training_has_the_device_and_newer_comfyuis_know(monkeypatch: pytest.MonkeyPatch, announced: bool) -> None:
    calls: list[str] = []
    management = SimpleNamespace(
        unload_all_models=lambda: calls.append("unload"), soft_empty_cache=lambda: calls.append("empty")
    )
    if announced:
        management.in_training = False
    monkeypatch.setattr(host.memory, "_owner", lambda: SimpleNamespace(drop_all=lambda: calls.append("drop")))
    fake_modules(monkeypatch, {"folder_paths": SimpleNamespace(), "comfy.model_management": management})
    with pytest.raises(RuntimeError), host.memory.training_mode():
        assert getattr(management, "in_training", None) is (True if announced else None)
        raise RuntimeError
    assert calls == ["drop", "unload", "empty"]
    assert getattr(management, "in_training", None) is (False if announced else None)
