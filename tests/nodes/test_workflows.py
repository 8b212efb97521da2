"""The shipped workflows: whole, up to date in both formats, and running."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.controls import random_net, save_single
from tests.micro.images import write_lora
from tools.make_workflows import BLUEPRINT, ONLY_IN_COMFYUI, OWN, train_and_compare_blueprint, ui_graph
from tools.make_workflows import FILES as MODELS
from tools.run_workflow import CORE_NODES, ROOT, load_pack, run, with_settings
from tools.templates import TEMPLATES
from tools.thumbnails import WIDTH, bundled_twin, is_for_sdxl

FOLDER = ROOT / "example_workflows"
FILES = sorted((FOLDER / "api").glob("*.json"))
SAVED = sorted((ROOT / "tests/saved").glob("*.json"))
NODES: dict[str, Any] = {**CORE_NODES, **load_pack().NODE_CLASS_MAPPINGS}
# The outputs of ComfyUI's own nodes. Graphs with them cannot run here: tests/comfy runs them.
COMFYUI = {name: node.RETURN_TYPES for name, node in ONLY_IN_COMFYUI.items()}
SMALL = {
    "WatchOptions": {"validate_every": 1, "sample_every": 1, "sample_steps": 2, "save_every": 1},
    "TrainSDXLLoRA": {"steps": 2, "rank": 2, "batch_size": 1},
    "SDXLGenerateCached": {"steps": 2, "count": 1, "width": 64, "height": 64},
    "LoadCaptionDataset": {"resolution": 64},
    "CaptionOptions": {"class_images": 1},
    "CompareLoRAs": {"steps": 1, "width": 64, "height": 64},
    "FindStrength": {"steps": 1, "count": 1, "width": 64, "height": 64},
    "PickCheckpoint": {"steps": 1, "width": 64, "height": 64},
}


Frame = tuple[float, float, float, float]  # left, top with the title, right, bottom


def frame(node: dict[str, Any]) -> Frame:
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - 30, left + width, top + height


def apart(one: Frame, other: Frame) -> bool:
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def contains(bounding: list[float], found: Frame) -> bool:
    left, top, width, height = bounding
    return left < found[0] and top < found[1] and found[2] < left + width and found[3] < top + height


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def small(workflow: dict[str, Any]) -> dict[str, Any]:
    """So few steps that a test can run it, in the settings that the workflow has and that are on."""

    def shrunk(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {name: value for name, value in SMALL.get(kind, {}).items() if inputs.get(name)}

    return {key: {**node, "inputs": shrunk(node["class_type"], node["inputs"])} for key, node in workflow.items()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of who saved the graphs, with pictures. The models are empty files."""
    for number, folder in enumerate(("photos", "more_photos", "held_out")):
        (tmp_path / "input" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), (80 * number, 90, 200)).save(tmp_path / "input" / folder / "a.png")
        (tmp_path / "input" / folder / "a.txt").write_text("a star, red", encoding="utf-8")
    Image.new("RGB", (64, 64), (200, 90, 20)).save(tmp_path / "input/start.png")
    for file in ("diffusers/my_base/model_index.json", "loras/my_style.safetensors", "controlnet/edges.safetensors"):
        (tmp_path / "models" / file).parent.mkdir(parents=True)
        (tmp_path / "models" / file).touch()
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    return tmp_path


def assert_agrees(node: dict[str, Any], workflow: dict[str, Any]) -> None:
    declared = NODES[node["class_type"]].INPUT_TYPES()
    known = {**declared["required"], **declared.get("optional", {})}
    assert set(declared["required"]) <= set(node["inputs"]) <= set(known), node
    for name, value in node["inputs"].items():
        kind = known[name][0]
        if isinstance(value, list):
            source = workflow[value[0]]["class_type"]
            assert (COMFYUI.get(source) or NODES[source].RETURN_TYPES)[value[1]] == kind, (name, node)
        elif isinstance(kind, list) and value not in (*MODELS, *OWN):
            assert value in kind, (name, node)


@pytest.mark.parametrize("path", FILES + SAVED, ids=lambda path: path.stem)
def test_inputs_and_links_agree_with_the_nodes(path: Path, home: Path) -> None:
    workflow = read(path)
    for node in workflow.values():
        if node["class_type"] not in COMFYUI:
            assert_agrees(node, workflow)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_page_format_is_up_to_date(path: Path) -> None:
    up_to_date = ui_graph(read(path), TEMPLATES[path.stem])
    assert read(FOLDER / path.name) == up_to_date, "run python -m tools.make_workflows"
    assert Image.open(FOLDER / f"{path.stem}.jpg").width == WIDTH


def test_readme_shows_every_template() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [
        name for name in TEMPLATES if f"example_workflows/{name}.jpg" not in readme or f"**{name}**" not in readme
    ]


def test_the_blueprint_is_up_to_date_and_whole() -> None:
    blueprint = read(BLUEPRINT)
    assert blueprint == train_and_compare_blueprint(), "run python -m tools.make_workflows"
    (inside,), (node,) = blueprint["definitions"]["subgraphs"], blueprint["nodes"]
    assert node["type"] == inside["id"]
    assert [entry["name"] for entry in node["inputs"]] == [entry["name"] for entry in inside["inputs"]]
    nodes = {node["id"]: node for node in inside["nodes"]}
    links = {link["id"]: link for link in inside["links"]}
    for link in links.values():
        if link["target_id"] in nodes:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
        if link["origin_id"] in nodes:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
    shown = [entry for entry in node["inputs"] if "widget" in entry]
    assert len(shown) == len(node["properties"]["proxyWidgets"]) == 9
    for key, widget in node["properties"]["proxyWidgets"]:
        (entry,) = (entry for entry in nodes[int(key)]["inputs"] if entry["name"] == widget)
        assert links[entry["link"]]["origin_id"] == -10 and links[entry["link"]]["type"] == entry["type"]


def test_every_node_of_the_pack_stands_in_a_template() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(TEMPLATES) == {path.stem for path in FILES}
    used = {node["class_type"] for path in FILES for node in read(path).values()}
    assert not set(load_pack().NODE_CLASS_MAPPINGS) - used


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_explains_itself_and_is_laid_out_without_overlap(name: str) -> None:
    graph = read(FOLDER / f"{name}.json")
    nodes, groups = graph["nodes"], graph["groups"]
    assert [group["title"].partition(" ")[0] for group in groups] == [str(n) for n in range(1, len(groups) + 1)]
    assert len({group["color"] for group in groups}) == len(groups)
    assert any(node["type"] == "MarkdownNote" for node in nodes)
    frames = {node["id"]: frame(node) for node in nodes}
    for one in nodes:
        inside = [group for group in groups if contains(group["bounding"], frames[one["id"]])]
        assert len(inside) == 1, f"{one['title']} stands in {len(inside)} groups"
        for other in nodes:
            assert one is other or apart(frames[one["id"]], frames[other["id"]]), (one["title"], other["title"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_readable_when_it_opens(name: str) -> None:
    """ComfyUI shows the nodes on three quarters of the page; below a zoom of 0.6 it draws no text."""
    frames = [frame(node) for node in read(FOLDER / f"{name}.json")["nodes"]]
    width = max(right for _, _, right, _ in frames) - min(left for left, *_ in frames)
    height = max(bottom for *_, bottom in frames) - min(top for _, top, _, _ in frames)
    assert min(1680 / width, 1000 / height) * 0.75 > 0.62


@pytest.mark.parametrize("name", TEMPLATES)
def test_links_run_from_left_to_right(name: str) -> None:
    graph = read(FOLDER / f"{name}.json")
    frames = {node["id"]: frame(node) for node in graph["nodes"]}
    ends = {entry["id"]: entry["parentId"] for entry in graph["extra"].get("linkExtensions", [])}
    points = {point["id"]: point for point in graph["extra"].get("reroutes", [])}
    for link, source, _, target, _, _ in graph["links"]:
        path = [(frames[target][0], frames[target][1])]
        at = ends.get(link)
        while at is not None:
            assert link in points[at]["linkIds"]
            path.append(tuple(points[at]["pos"]))
            at = points[at].get("parentId")
        path.append((frames[source][2], frames[source][1]))
        steps = [x for x, _ in reversed(path)]
        assert steps == sorted(steps), (source, target)
        for (x1, y1), (x2, y2) in zip(path[1:-1], path[2:-1], strict=False):
            assert y1 == y2 and all(b < y1 or t > y1 for left, t, right, b in frames.values() if x2 < left < x1)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_sdxl")])
def test_a_template_for_sdxl_says_where_its_models_are(name: str) -> None:
    workflow = read(FOLDER / f"api/{name}.json")
    assert is_for_sdxl(workflow)
    named = {value for node in workflow.values() for value in node["inputs"].values() if str(value) in MODELS}
    nodes = read(FOLDER / f"{name}.json")["nodes"]
    links = [model for node in nodes for model in node["properties"].get("models", [])]
    assert {model["name"] for model in links} == named
    for model in links:
        assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(model["name"])
        assert model["directory"] in ("checkpoints", "loras", "controlnet")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_runs_as_shipped_but_for_the_steps(path: Path, tmp_path: Path) -> None:
    """Those for real SDXL with the bundled models, as for their thumbnails; a ControlNet is only in tests/comfy."""
    workflow = small(bundled_twin(read(path)))
    outputs = run(workflow, tmp_path)
    for key, node in workflow.items():
        if node["class_type"] == "SDXLGenerateCached":
            images, _, prompts, _ = (values[0] for values in outputs[key])
            side = round(64 * node["inputs"].get("hires_scale", 1))
            assert images.shape == (len(prompts.splitlines()), side, side, 3) and images.std() > 0
        if node["class_type"] == "CLIPScore":
            assert 0 <= outputs[key][2][0] <= 100


def test_the_comparison_asks_for_what_the_dataset_does_not_show() -> None:
    workflow = read(ROOT / "example_workflows/api/train_and_compare.json")
    without, with_lora = (node["inputs"] for node in workflow.values() if node["class_type"] == "SDXLGenerateCached")
    captions = {path.read_text(encoding="utf-8").strip() for path in (ROOT / "assets/sample-dataset").rglob("*.txt")}
    prompts = without["prompt"].splitlines()
    assert len(prompts) >= 8 and not captions & set(prompts)
    assert {**without, "lora_stack": ["3", 0]} == with_lora, "the two differ in the LoRA alone"


# Never edit the files in tests/saved: they are what users have saved.


@pytest.mark.slow
def test_a_graph_of_the_first_release_still_runs(tmp_path: Path) -> None:
    outputs = run(read(ROOT / "tests/saved/2026-11_all_nodes.json"), tmp_path)
    stack = outputs["4"][0][0]
    assert stack == [("saved.safetensors", 0.8, 0.8)]
    assert len(outputs["6"][3]) == 2, "a score for each image, as a list"
    assert outputs["3"][4][0].shape == (1, 64, 64, 3)
    assert (tmp_path / "lora_runs/saved/run.yaml").is_file()


@pytest.mark.slow
def test_a_graph_with_every_input_still_runs(home: Path, micro_sdxl: Path, micro_base: SDXLBase) -> None:
    """All nodes but ApplyLoRAStack, which takes ComfyUI's models, and every input that 0.3.0 had."""
    shutil.copytree(micro_sdxl, home / "models/diffusers/my_base", dirs_exist_ok=True)
    write_lora(home / "models/loras/my_style.safetensors", micro_base, seed=0)
    save_single(home / "models/controlnet/edges.safetensors", random_net(micro_base, seed=0))
    outputs = run(read(ROOT / "tests/saved/2026-11_every_input.json"), home)
    first, second = outputs["14"][0][0]
    assert (first, second) == (("every_input.safetensors", 0.8, 0.8), ("my_style.safetensors", 0.5, 1.0))
    assert first.blocks == "mid_block=0.5"
    changed = {"blocks": "mid_block", "snr_gamma": 5.0, "ema_decay": 0.9, "shuffle_tags": True, "validate_every": 1}
    assert changed.items() <= outputs["11"][0][0].items(), "what each option node adds"
    assert [control.config.strength for control in outputs["17"][0][0]] == [0.8, 1.0]
    assert (outputs["18"][0][0].shape, outputs["18"][3][0]["samples"].shape) == ((1, 64, 64, 3), (1, 4, 8, 8))
    assert len(outputs["20"][3]) == 1 and outputs["21"][1][0] > 0
    files = [home / "loras" / f"{name}.safetensors" for name in ("every_input", "saved_stack", "saved_lora", "merged")]
    assert all(path.is_file() for path in [*files, home / "diffusers/merged_base/model_index.json"])


def test_a_loop_an_unknown_node_and_a_missing_input_are_named(tmp_path: Path) -> None:
    base = {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "auto"}}
    with pytest.raises(ValueError, match="loop through node"):
        run({"1": {**base, "inputs": {"base": ["2", 0]}}, "2": {**base, "inputs": {"base": ["1", 0]}}}, tmp_path)
    with pytest.raises(ValueError, match="node 1: KSampler is unknown"):
        run({"1": {"class_type": "KSampler", "inputs": {}}}, tmp_path)
    with pytest.raises(ValueError, match="lacks the input precision"):
        run({"1": {**base, "inputs": {"base": "tiny-sdxl (bundled)"}}}, tmp_path)
    with pytest.raises(ValueError, match="node 7, which is not in the workflow"):
        run({"1": {**base, "inputs": {"base": ["7", 0]}}}, tmp_path)


def test_what_gets_nothing_does_not_run_and_lists_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Source:
        RETURN_TYPES = ("INT", "IMAGE")
        OUTPUT_IS_LIST = (True, False)
        FUNCTION = "make"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def make(self) -> tuple[Any, ...]:
            return [1, 2, 3], load_pack().nodes.host.comfy.nothing()

    class Double:
        RETURN_TYPES = ("INT",)
        FUNCTION = "double"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"value": ("INT", {})}}

        def double(self, value: Any) -> tuple[int]:
            return (value * 2,)

    monkeypatch.setitem(CORE_NODES, "Source", Source)
    monkeypatch.setitem(CORE_NODES, "Double", Double)
    workflow = {
        "1": {"class_type": "Source", "inputs": {}},
        "2": {"class_type": "Double", "inputs": {"value": ["1", 0]}},
        "3": {"class_type": "Double", "inputs": {"value": ["1", 1]}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    outputs = run(workflow, tmp_path)
    assert outputs["2"] == ([2, 4, 6],)
    assert isinstance(outputs["3"][0][0], load_pack().nodes.host.comfy.Nothing)
    assert not (tmp_path / "temp").exists()


def test_settings_from_the_command_line() -> None:
    workflow = {"3": {"class_type": "TrainSDXLLoRA", "inputs": {"steps": 5, "lora_name": "a"}}}
    changed = with_settings(workflow, ["3.steps=7", "3.lora_name=b c"])
    assert changed["3"]["inputs"] == {"steps": 7, "lora_name": "b c"}
    assert workflow["3"]["inputs"]["steps"] == 5
    with pytest.raises(ValueError, match=r"no input 3\.stepz"):
        with_settings(workflow, ["3.stepz=7"])


def test_load_and_save_image(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    red = torch.tensor([1.0, 0.0, 0.0]).expand(1, 2, 3, 3)
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/a"}},
    }
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "input/a.png")
    assert torch.equal(run(workflow, tmp_path)["1"][0][0], red)
    assert (tmp_path / "sub/a_00001_.png").is_file()
