"""Our parts under the memory management of a real ComfyUI, and what its server keeps."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory_manners import micro_round, prepare, rounds, small_core, unloaded
from tests.comfy.conftest import Server, install_pack
from tests.comfy.test_server import job, picture

MEGABYTE = 2**20
NOTHING = {"held": [], "on the device": [], "in memory": []}
CORE = "ComfyUI's model"


@pytest.fixture(scope="module")
def seen(comfyui: Path, comfyui_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("memory")
    install_pack(home / "custom_nodes" / "sdxl-lora-nodes")
    command = [comfyui_python, str(Path(__file__).with_name("memory.py")), str(home)]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def classic(seen: dict[str, Any]) -> dict[str, Any]:
    return seen["classic"]


@pytest.fixture(scope="module")
def dynamic(seen: dict[str, Any], comfyui: Path) -> dict[str, Any]:
    if not has_dynamic_vram(comfyui):
        pytest.skip("this ComfyUI has no dynamic VRAM: it came with 0.16")
    return seen["dynamic"]


def has_dynamic_vram(comfyui: Path) -> bool:
    return "ModelPatcherDynamic" in (comfyui / "comfy/model_patcher.py").read_text(encoding="utf-8")


def state(*held: str, on: str) -> dict[str, Any]:
    """The parts that are held, which are those in memory, and what is on the device."""
    return {"held": sorted(held), "on the device": [on], "in memory": sorted(held)}


def test_what_is_on_the_device_is_evicted_before_what_rests_beside_it(classic: dict[str, Any]) -> None:
    assert classic["our parts were used"] == state("text_encoders", "unet", "vae", on="unet")
    # The eviction of the others would have freed nothing.
    assert classic["ComfyUI's model was loaded"] == state("text_encoders", "vae", on=CORE)


def test_parts_in_use_stay_and_comfyuis_model_goes(classic: dict[str, Any]) -> None:
    assert classic["two of our parts are in use"] == {"on the device": ["unet", "vae"]}


def test_unloading_releases_everything_and_parts_come_back(classic: dict[str, Any]) -> None:
    assert classic["all models were unloaded"] == NOTHING
    assert classic["our parts were used again"] == state("unet", "vae", on="unet")


def test_training_begins_on_a_free_device(classic: dict[str, Any]) -> None:
    assert classic["training has begun"] == NOTHING


def test_beside_a_model_in_dynamic_vram(dynamic: dict[str, Any]) -> None:
    """ComfyUI's own model gives up the device but stays listed; ours is evicted as a whole, and not in part."""
    assert dynamic["ComfyUI's model was loaded"] == state(on=CORE)
    assert dynamic["a part of ours was used"] == {**state("unet", on="unet"), "listed": True}
    assert dynamic["ComfyUI's model was loaded again"] == state(on=CORE)
    assert dynamic["training has begun"] == NOTHING
    assert dynamic["all models were unloaded"] == NOTHING


def test_a_training_respects_what_comfyui_reserves_and_makes_room_for_what_it_takes(classic: dict[str, Any]) -> None:
    plain, reserved, low = (classic[f"memory for a training{case}"] for case in ("", ", reserved", ", --lowvram"))
    assert reserved["withheld"] == 1000 and not plain["least"] and low["least"]
    assert plain["before"] == [CORE] and plain["after"] == []


@pytest.fixture(scope="module")
def small(start_server: Callable[..., AbstractContextManager[Server]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of its own with a small model of ComfyUI's."""
    base = tmp_path_factory.mktemp("small") / "comfy"
    prepare(base, 64)
    with start_server(base) as server:
        yield server


def loads(server: Server, graph: dict[str, Any]) -> set[str]:
    """The classes of the models that ComfyUI has to load for a graph."""
    seen = len(server.text())
    server.run(graph)
    return set(re.findall(r"Requested to load (\w+)", server.text()[seen:]))


def test_comfyuis_models_leave_for_a_training_only(small: Server) -> None:
    assert loads(small, small_core(1, 1)) == {"SDXL"}
    assert loads(small, small_core(1, 2) | picture(seed=1)) == {"SDXLPart"}
    small.run(small_core(1, 2) | job())  # ComfyUI keeps the sampler's result, and so the node's MODEL
    assert loads(small, small_core(1, 3)) == {"SDXL"}


def test_our_models_go_with_unload_models(small: Server) -> None:
    small.run(picture(seed=2))
    assert loads(small, picture(seed=3)) == set()
    unloaded(small)
    assert loads(small, picture(seed=4)) == {"SDXLPart"}


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.accept)])
def test_memory_is_flat_over_rounds(small: Server, times: int) -> None:
    """Of training, generating and ComfyUI's own sampler. benchmarks/memory_manners.py has them in full size, too."""
    used = list(rounds(small, micro_round, times))
    early = used[times // 4]  # libraries fill their own caches at first
    assert used[-1] - early < 20 * MEGABYTE, used
    assert unloaded(small) - early < 20 * MEGABYTE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="ComfyUI turns dynamic VRAM on with CUDA only")
def test_rounds_in_dynamic_vram(
    comfyui: Path, start_server: Callable[..., AbstractContextManager[Server]], tmp_path: Path
) -> None:
    prepare(tmp_path / "comfy", 64)
    with start_server(tmp_path / "comfy", device=()) as server:
        assert ("DynamicVRAM support detected and enabled" in server.text()) == has_dynamic_vram(comfyui)
        list(rounds(server, micro_round, 2))
