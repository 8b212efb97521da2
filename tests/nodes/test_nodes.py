"""The nodes and what stands between them and ComfyUI, without ComfyUI."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.nodes.fake_comfyui import fake_modules
from tools.run_workflow import ROOT, load_pack

PACK = load_pack()
NODES: dict[str, Any] = PACK.NODE_CLASS_MAPPINGS
host, choices, wires = PACK.nodes.host, PACK.nodes.choices, PACK.nodes.wires


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_importing_the_pack_is_cheap() -> None:
    heavy = ["diffusers", "transformers", "peft", "accelerate", "pydantic", "matplotlib", "torchvision"]
    heavy += ["pytorch_optimizer", "bitsandbytes"]
    code = f"""
import importlib.util, json, sys
import numpy, torch, safetensors.torch, PIL.Image
root, name = {str(ROOT)!r}, "pack-1/nodes_x_1"
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
sys.modules[name] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
print(json.dumps([len(pack.NODE_CLASS_MAPPINGS), [name for name in {heavy} if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(NODES), []]


def test_stack_of_any_pack_is_read_and_never_changed() -> None:
    class Blocks(tuple):
        blocks = "1,0,1"

    special = Blocks(("c.safetensors", 0.5, 0.0))
    stack: list[Any] = [("a.safetensors", 0.8), ["b.safetensors", 1, 2], {"name": "d.safetensors", "strength": 0.3}]
    stack += [special, ("None", 1.0, 1.0)]
    before = list(stack)
    read = wires.read_stack(stack)
    assert read == [
        ("a.safetensors", 0.8, 0.8),
        ("b.safetensors", 1.0, 2.0),
        ("d.safetensors", 0.3, 0.3),
        ("c.safetensors", 0.5, 0.0),
    ]
    assert read[3] is special
    assert stack == before
    assert wires.read_stack(None) == []
    with pytest.raises(ValueError, match=r"lora_stack contains 'a\.safetensors'"):
        wires.read_stack(["a.safetensors"])


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"on": False, "lora": "a", "strength": 1.0}, None),
        ({"name": "a", "active": False}, None),
        ({"name": "a", "enabled": 0}, None),
        ({"on": True, "lora": "a", "strength": 0.5, "strengthTwo": None}, ("a", 0.5, 0.5)),
        ({"on": True, "lora": "a", "strength": 0.5, "strengthTwo": 0.2}, ("a", 0.5, 0.2)),
        ({"name": "a", "strength": "0.7", "clipStrength": 0.1, "expanded": True, "locked": False}, ("a", 0.7, 0.1)),
        ({"lora_name": "a", "model_strength": 0.3, "clip_strength": 0.4}, ("a", 0.3, 0.4)),
    ],
)
def test_rows_of_mappings_are_read_in_the_spellings_of_several_packs(row: Any, read: Any) -> None:
    assert wires.read_stack([row]) == ([read] if read else [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "a", "force": 0.5}, "a row with 'force', which is unknown: use name, strength_model and"),
        ({"name": "a", "strength": "much"}, "the strength 'much' in"),
        (("a", math.nan, 1.0), "the strength nan in"),
        (("a", None), "the strength None in"),
        (["a", "x", 1.0], "the strength 'x' in"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_in_a_sentence(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"lora_stack has {message}"):
        wires.read_stack([row])


def test_loras_are_found_by_other_spellings_of_their_path(home: Path) -> None:
    lora = home / "loras" / "styles" / "ink.safetensors"
    lora.parent.mkdir(parents=True)
    lora.touch()
    for name in ("styles/ink.safetensors", "styles\\ink.safetensors", "styles/ink", str(lora)):
        assert choices.find("lora", name).resolve() == lora.resolve()
    with pytest.raises(ValueError, match="is not a valid relative path"):
        choices.find("lora", "/etc/passwd")


def test_images_go_in_and_out_without_a_change() -> None:
    pixels = [np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5 for _ in range(2)]
    image = wires.to_image(pixels)
    assert image.shape == (2, 4, 4, 3) and image.dtype == torch.float32 and float(image.max()) <= 1
    assert all(np.array_equal(a, b) for a, b in zip(wires.from_image(image), pixels, strict=True))
    transparent = torch.zeros(1, 2, 2, 4)
    assert wires.from_image(transparent)[0].min() == 255
    assert wires.from_image(torch.full((1, 2, 2, 1), math.nan))[0].shape == (2, 2, 3)


def test_options_fill_in_and_contradictions_name_both() -> None:
    widgets = {"steps": 20, "seed": 0, "sample_prompts": "one\n\n two "}
    config, _ = PACK.nodes.widgets.train_config({"weight_decay": 0.1, "seed": 5}, widgets)
    assert (config.steps, config.seed, config.weight_decay, config.sample_prompts) == (20, 5, 0.1, ("one", "two"))
    with pytest.raises(ValueError, match="options sets steps to 30, the widget steps to 20"):
        PACK.nodes.widgets.train_config({"steps": 30}, widgets)
    with pytest.raises(ValueError, match="unknown setting stepz"):
        PACK.nodes.widgets.train_config({"stepz": 30}, widgets)


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        (
            {"lora_name": ""},
            "lora_name is '': use a name that neither is empty nor begins or ends with a dot or a space",
        ),
        ({"steps": 0}, "steps is 0: give a value from 1 to 1000000"),
        ({"lr_schedule": "spiral"}, "lr_schedule is 'spiral': give one of constant, linear, cosine, "),
    ],
)
def test_a_wrong_widget_is_named_without_the_node(widgets: dict[str, Any], message: str) -> None:
    """ComfyUI puts the node's name before it."""
    with pytest.raises(ValueError) as raised:
        PACK.nodes.widgets.train_config(None, widgets)
    assert str(raised.value).startswith(message) and "Value error" not in str(raised.value)


def test_every_node_that_shows_something_shows_it_again_when_cached() -> None:
    """ComfyUI sends what output nodes show in every run, and of other nodes only if they ask for it."""
    silent = {
        name
        for name, node in NODES.items()
        if not getattr(node, "OUTPUT_NODE", False) and not getattr(node, "HAS_INTERMEDIATE_OUTPUT", False)
    }
    options = {name for name, node in NODES.items() if issubclass(node, PACK.nodes.train_options.TrainOptions)}
    assert silent == options | {"CompareVariant"}


def test_names_of_datasets(home: Path) -> None:
    for folder in ("input/photos/nested", "datasets/more/nested", "input/.hidden/nested", "input/3d"):
        (home / folder).mkdir(parents=True)
    assert choices.names("dataset") == ["more [datasets]", "photos", "sample: 8-bit (bundled)"]
    assert choices.find("dataset", "more [datasets]") == home / "datasets/more"
    assert choices.find("dataset", "photos/nested") == home / "input/photos/nested"
    assert choices.find("dataset", "3d") == home / "input/3d", "an empty folder is not offered, but found"
    assert choices.check("dataset", None) is True
    assert "'../photos' is not a valid relative path" in choices.check("dataset", "../photos")
    assert "was not found" in choices.check("dataset", "nowhere")


def test_names_of_models(home: Path) -> None:
    files = ("checkpoints/a.safetensors", "checkpoints/b.ckpt", "diffusers/x/model_index.json", "loras/l.safetensors")
    for file in files:
        path = home / "models" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (home / "loras").mkdir()
    (home / "loras/trained.safetensors").write_bytes(b"")
    assert choices.names("base") == ["a.safetensors", "x", "tiny-sdxl (bundled)"]
    assert choices.names("lora")[:2] == ["l.safetensors", "trained.safetensors"]
    assert choices.lora_name_taken("trained.safetensors") and not choices.lora_name_taken("other.safetensors")
    assert NODES["LoadLoRA"].VALIDATE_INPUTS(lora_name="(incoming)") is True
    assert "was not found" in NODES["LoadLoRA"].VALIDATE_INPUTS(lora_name="other.safetensors")


def test_embeddings_are_found_by_name_in_any_subfolder(home: Path) -> None:
    files = (
        "models/embeddings/deep/cat.safetensors",
        "embeddings/cat.safetensors",
        "embeddings/dog.pt",
        "models/embeddings/deep/a, b.safetensors",
    )
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(b"")
    find = choices.find_embedding
    assert find("cat") == find("cat.safetensors") == home / "embeddings/cat.safetensors"
    assert find("deep/cat") == find("deep\\cat") == home / "models/embeddings/deep/cat.safetensors"
    assert find("dog") == home / "embeddings/dog.pt", "so that it can be said why it is not read"
    assert find("CAT") == home / "embeddings/cat.safetensors", "as on Windows, so everywhere"
    assert not any(find(name) for name in ("at", "deep", "../embeddings/cat", ""))


def test_a_changed_embedding_is_seen(home: Path) -> None:
    (home / "embeddings").mkdir()
    is_changed = NODES["SDXLGenerateCached"].IS_CHANGED
    request = {"prompt": "a (embedding:cat:1.2), b", "negative_prompt": "", "prompt_syntax": "comfy", "cache": "use"}
    stamps = [is_changed(**request)]
    for content in (b"1", b"22"):
        (home / "embeddings/cat.safetensors").write_bytes(content)
        stamps.append(is_changed(**request))
    assert len(set(stamps)) == 3
    assert is_changed(**{**request, "prompt_syntax": "plain"}) == is_changed(prompt=None, prompt_syntax="comfy") == ""


def test_changes_on_disk_are_seen_and_errors_are_not_raised(home: Path) -> None:
    (home / "input/photos").mkdir(parents=True)
    is_changed = NODES["LoadCaptionDataset"].IS_CHANGED
    before = is_changed(folder="photos", resolution=64)
    (home / "input/photos/a.txt").write_text("a caption", encoding="utf-8")
    assert is_changed(folder="photos", resolution=64) != before
    assert "was not found" in is_changed(folder="gone")
    assert math.isnan(NODES["SDXLGenerateCached"].IS_CHANGED(cache="refresh"))


def test_the_page_gets_the_report_of_a_dataset_and_its_problems(home: Path) -> None:
    (home / "input/photos").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(home / "input/photos/a.png")
    (home / "input/photos/b.png").write_bytes(b"no image")
    shown = NODES["LoadCaptionDataset"]().load("photos", trigger_word="ohwx", resolution=64)["ui"]
    (text,), (grid,) = shown["text"], shown["sdxl_lora_dataset"]
    assert text.startswith("skipped: 1\n  photos/b.png: cannot be used")
    assert grid["folder"] == "photos" and grid["problems"][0].startswith("photos/b.png: cannot be used")
    assert json.loads(json.dumps(grid)) == grid and len(shown["images"]) == 1


def test_incoming_lora_is_weighted_and_can_be_left_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = PACK.sdxl_lora_core.lora.describe.LoRACard
    monkeypatch.setattr(PACK.nodes.load_lora, "read_card", lambda path: card(path.name, (), ("ohwx", "cat")))
    (home / "loras").mkdir()
    for name in ("first.safetensors", "trained.safetensors"):
        (home / "loras" / name).write_bytes(b"")
    stack = [("first.safetensors", 1.0, 1.0), ("trained.safetensors", 1.0, 1.0)]
    node = NODES["LoadLoRA"]()
    weighted, info, words = node.load("(incoming)", 0.5, 0.25, True, lora_stack=stack)["result"]
    assert weighted == [stack[0], ("trained.safetensors", 0.5, 0.25)]
    assert (info, words) == ("trained.safetensors", "ohwx, cat")
    assert node.load("(incoming)", 0.5, 0.5, False, lora_stack=stack)["result"] == (
        stack[:1],
        "trained.safetensors is off",
        "",
    )
    assert node.load("trained.safetensors", 0.5, 0.5, True)["result"][0] == [("trained.safetensors", 0.5, 0.5)]
    assert len(stack) == 2
    (by_block,) = node.load("trained.safetensors", 1.0, 1.0, True, blocks="mid_block=0")["result"][0]
    assert by_block == ("trained.safetensors", 1.0, 1.0) and by_block.blocks == "mid_block=0"
    (again,) = node.load("(incoming)", 0.5, 0.5, True, lora_stack=[by_block])["result"][0]
    assert again == ("trained.safetensors", 0.5, 0.5) and again.blocks == "mid_block=0"
    assert choices.lora_refs([again])[0].blocks == "mid_block=0"
    with pytest.raises(ValueError, match="LoRA trained.safetensors: blocks names 'middle'"):
        node.load("trained.safetensors", 1.0, 1.0, True, blocks="middle=0")
    with pytest.raises(ValueError, match="lora_stack has no LoRA"):
        node.load("(incoming)", 1.0, 1.0, True)


def test_training_mode_undoes_inference_mode() -> None:
    with torch.inference_mode(), host.memory.training_mode():
        layer = torch.nn.Linear(2, 1)
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is not None


def test_previews_are_written_once_by_content(home: Path) -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    first, second = (PACK.nodes.previews.show((1,), "text", [pixels])["ui"]["images"][0] for _ in range(2))
    assert first == second
    written = Image.open(home / "temp" / first["subfolder"] / first["filename"])
    assert np.array_equal(np.asarray(written), pixels)


def test_a_preview_carries_the_graph_that_shows_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base, _) = NODES["LoadSDXLBase"]().load("tiny-sdxl (bundled)", "fp32")["result"]
    node = NODES["SDXLGenerateCached"]
    assert node.INPUT_TYPES()["hidden"] == {"graph": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    widgets = list(node.INPUT_TYPES()["required"].items())[1:]
    request = {name: options["default"] for name, (_, options) in widgets}
    request |= {"prompt": "small", "width": 64, "height": 64, "steps": 1}

    def shown(**hidden: Any) -> dict[str, Any]:
        preview = node().generate(base=base, **request, **hidden)["ui"]["images"][0]
        with Image.open(home / "temp" / preview["subfolder"] / preview["filename"]) as image:
            return dict(image.info)

    first = shown(graph={"1": {}}, extra_pnginfo={"workflow": {"nodes": [1]}})
    second = shown(graph={"1": {}}, extra_pnginfo={"workflow": {"nodes": [2]}})  # the same image, from the cache
    assert [json.loads(info["workflow"])["nodes"] for info in (first, second)] == [[1], [2]]
    assert first["parameters"].startswith("small\nSteps: 1, ") and json.loads(first["prompt"]) == {"1": {}}
    options = SimpleNamespace(args=SimpleNamespace(disable_metadata=True))
    fake_modules(monkeypatch, {"folder_paths": SimpleNamespace(), "comfy.cli_args": options})
    assert host.comfy.metadata({"prompt": {"1": {}}}) is None


class FakeComfy:
    """The parts of ComfyUI's memory management that ComfyParts talks to."""

    def __init__(self) -> None:
        self.loaded: list[list[Any]] = []
        self.rooms: list[int] = []
        self.current_loaded_models: list[Any] = []

    def load_models_gpu(self, patchers: list[Any], memory_required: int, force_full_load: bool) -> None:
        self.loaded.append([patcher.model.part for patcher in patchers])
        self.rooms.append(memory_required)
        self.current_loaded_models = [SimpleNamespace(model=patcher) for patcher in patchers]


class FakePatcher:
    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model = model
        self.callbacks: list[Any] = []

    def add_callback(self, kind: str, callback: Any) -> None:
        self.callbacks.append(callback)

    def detach(self) -> None:
        for callback in self.callbacks:
            callback(self, True)


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> FakeComfy:
    fake = FakeComfy()
    patching = SimpleNamespace(ModelPatcher=FakePatcher, CallbacksMP=SimpleNamespace(ON_DETACH="on_detach"))
    fake_modules(monkeypatch, {"comfy.model_management": fake, "comfy.model_patcher": patching})
    host.memory._whole_patcher.cache_clear()
    return fake


def request(name: str, key: str, module: torch.nn.Module, room: int = 0) -> Any:
    parts = PACK.sdxl_lora_core.runtime.loaded_parts
    return parts.PartRequest(name, key, lambda: parts.Loaded(module), room=room)


def test_parts_in_use_are_loaded_together_and_evicted_ones_are_freed(comfy: FakeComfy) -> None:
    owner = host.memory.ComfyParts(torch.device("cpu"))
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(2, 2)
    owner.borrow(request("text_encoder", "a", first))
    owner.borrow(request("text_encoder_2", "b", second))
    assert comfy.loaded[-1] == [first, second]
    owner.finish("text_encoder")
    assert owner.borrow(request("text_encoder_2", "b", torch.nn.Linear(3, 3))).module is second
    assert comfy.loaded[-1] == [second]
    owner._patchers["text_encoder_2"].detach()
    third = torch.nn.Linear(3, 3)
    assert owner.borrow(request("text_encoder_2", "b", third)).module is third, "ComfyUI took the second one"
    assert comfy.loaded[-1] == [third]


def test_comfyui_is_told_how_much_room_computing_takes(comfy: FakeComfy) -> None:
    owner = host.memory.ComfyParts(torch.device("cpu"))
    with owner.phase(request("vae", "a", torch.nn.Linear(1, 1), room=12345)):
        assert comfy.rooms == [12345]


def test_what_rests_beside_the_device_goes_with_what_comfyui_unloads(comfy: FakeComfy) -> None:
    """A small card holds one part: the others lie in memory, where ComfyUI does not see them."""
    owner = host.memory.ComfyParts(torch.device("cpu"))
    for part in ("text_encoders", "unet", "vae"):
        owner.borrow(request(part, "a", torch.nn.Linear(1, 1)))
        owner.finish(part)
    assert [part in owner._held for part in ("text_encoders", "unet", "vae")] == [True, True, True]
    owner._patchers["vae"].detach()  # the only one that is listed
    assert [part in owner._held for part in ("text_encoders", "unet", "vae")] == [False, False, False]


def test_a_part_that_comfyui_does_not_move_is_no_image(comfy: FakeComfy) -> None:
    owner = host.memory.ComfyParts(torch.device("meta"))
    with pytest.raises(ValueError, match="did not load the unet to the meta, as with --novram: start it without"):
        owner.borrow(request("unet", "a", torch.nn.Linear(1, 1)))


def test_leaving_the_device_is_not_being_evicted(comfy: FakeComfy) -> None:
    owner = host.memory.ComfyParts(torch.device("cpu"))
    layer = torch.nn.Linear(1, 1)
    owner.borrow(request("unet", "a", layer))
    owner.finish("unet", offload=True)
    assert owner.borrow(request("unet", "a", torch.nn.Linear(2, 2))).module is layer


def test_a_base_is_told_what_it_predicts(home: Path) -> None:
    load = NODES["LoadSDXLBase"]().load
    plain, info = load("tiny-sdxl (bundled)", "fp32")["result"]
    assert (plain.prediction_type, plain.zero_terminal_snr) == ("epsilon", False) and "epsilon prediction" in info
    told, info = load("tiny-sdxl (bundled)", "fp32", "v_prediction", "on")["result"]
    assert (told.prediction_type, told.zero_terminal_snr) == ("v_prediction", True)
    assert "v_prediction prediction, zero terminal SNR" in info
    with pytest.raises(ValueError, match="would predict epsilon with zero terminal SNR.*set prediction"):
        load("tiny-sdxl (bundled)", "fp32", zero_terminal_snr="on")
