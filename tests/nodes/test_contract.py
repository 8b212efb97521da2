"""The nodes' contract with saved graphs and with ComfyUI: tests/nodes/contract.json, and rules for every node."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.make_contract import PATH, Contract, contract, differences, dump, frozen
from tools.make_workflows import is_widget
from tools.run_workflow import ROOT, load_pack

PACK = load_pack()
NODES: dict[str, Any] = PACK.NODE_CLASS_MAPPINGS
UPDATE = (
    "Saved graphs rely on this: only new inputs at the end of the optional ones and new nodes leave them whole. "
    "If it is meant, run python -m tools.make_contract"
)

every_node = pytest.mark.parametrize("node_id", NODES)


def inputs_of(node: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    declared = node.INPUT_TYPES()
    return {**declared["required"], **declared.get("optional", {})}


def entries(contract: Contract, node_id: str, group: str) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in contract[node_id][group]}


# The contract


def test_the_nodes_are_what_the_contract_says() -> None:
    now = contract()
    assert not (found := differences(now, frozen())), "\n".join([*found, UPDATE])
    assert PATH.read_text(encoding="utf-8") == dump(now), "run python -m tools.make_contract"


def test_every_display_name_has_its_node() -> None:
    assert list(PACK.NODE_DISPLAY_NAME_MAPPINGS) == list(NODES)


def test_the_contract_is_the_same_whatever_files_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contract()
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/mine.safetensors").touch()
    assert "mine.safetensors" in inputs_of(NODES["LoadLoRA"])["lora_name"][0]
    assert dump(contract()) == dump(before)
    assert os.environ["SDXL_LORA_HOME"] == str(tmp_path)


@every_node
def test_combos_of_files_are_those_that_the_node_checks_by_itself(node_id: str) -> None:
    """ComfyUI compares all others with their choices, and a list of files may be older than the file."""
    checks = getattr(NODES[node_id], "VALIDATE_INPUTS", lambda: True)
    inputs = frozen()[node_id]["required"] + frozen()[node_id]["optional"]
    assert set(inspect.signature(checks).parameters) == {
        entry["name"] for entry in inputs if entry["type"] == "COMBO of files"
    }


def _default(found: Contract) -> None:
    entries(found, "LoadLoRA", "required")["strength_model"]["default"] = 0.5


def _number_of_another_kind(found: Contract) -> None:
    entries(found, "LoadLoRA", "required")["strength_model"]["default"] = 1


def _range(found: Contract) -> None:
    entries(found, "TrainSDXLLoRA", "required")["rank"]["max"] = 2048


def _choices(found: Contract) -> None:
    entries(found, "SDXLGenerateCached", "required")["sampler"]["choices"].remove("heun")


def _flag(found: Contract) -> None:
    del entries(found, "MergeLoRAs", "optional")["seed"]["control_after_generate"]


def _order_of_inputs(found: Contract) -> None:
    found["WatchOptions"]["optional"][1:3] = reversed(found["WatchOptions"]["optional"][1:3])


def _new_input(found: Contract) -> None:
    found["CLIPScore"]["optional"].append({"name": "device", "type": "STRING"})


def _order_of_nodes(found: Contract) -> None:
    found["LoadCaptionDataset"] = found.pop("LoadCaptionDataset")


def _lost_node(found: Contract) -> None:
    del found["SDXLImageCache"]


def _output(found: Contract) -> None:
    entries(found, "CLIPScore", "outputs")["scores"]["is_list"] = False


def _function(found: Contract) -> None:
    found["ApplyLoRAStack"]["function"] = "run"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (_default, "LoadLoRA, required strength_model: "),
        (_number_of_another_kind, "LoadLoRA, required strength_model: "),
        (_range, "TrainSDXLLoRA, required rank: "),
        (_choices, "SDXLGenerateCached, required sampler: "),
        (_flag, "MergeLoRAs, optional seed: "),
        (_order_of_inputs, "WatchOptions, order of optional: options checkpoint_every epochs"),
        (
            _new_input,
            "CLIPScore, order of optional: tagger scale tag_threshold device, and in the contract tagger scale",
        ),
        (_order_of_nodes, "nodes: LoadSDXLBase TrainSDXLLoRA"),
        (_lost_node, "nodes: "),
        (_output, "CLIPScore, outputs scores: "),
        (_function, 'ApplyLoRAStack, function: "run", and in the contract "apply"'),
    ],
)
def test_a_change_is_found_and_named(change: Callable[[Contract], None], place: str) -> None:
    changed = copy.deepcopy(frozen())
    change(changed)
    found = differences(changed, frozen())
    assert found and found[0].startswith(place), found
    assert dump(changed) != dump(frozen())


def test_a_change_of_a_node_breaks_the_contract_until_it_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stronger(NODES["LoadLoRA"]):
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            declared = super().INPUT_TYPES()
            kind, options = declared["required"]["strength_model"]
            declared["required"]["strength_model"] = (kind, {**options, "max": 20.0, "tooltip": "Other words."})
            return declared

    before = contract()
    monkeypatch.setitem(NODES, "LoadLoRA", Stronger)
    (found,) = differences(contract(), before)
    assert found.startswith("LoadLoRA, required strength_model: ")
    assert '"max": 20.0' in found.split(", and in the contract ")[0] and "words" not in found
    assert not differences(contract(), json.loads(dump(contract())))


# What holds for every node, whatever the contract says


@every_node
def test_everything_is_explained(node_id: str) -> None:
    node = NODES[node_id]
    assert node.CATEGORY.split("/")[0] == "SDXL LoRA" and node.DESCRIPTION
    assert len(set(node.SEARCH_ALIASES)) >= 3
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES) and all(node.OUTPUT_TOOLTIPS)
    for name, (_, options) in inputs_of(node).items():
        assert options.get("tooltip"), f"{node_id}.{name} has no tooltip"


@every_node
def test_optional_inputs_are_links_or_advanced(node_id: str) -> None:
    """But for nodes that have no others: the option nodes would show nothing. The page shows the preset first."""
    declared = NODES[node_id].INPUT_TYPES()
    optional = declared.get("optional", {})
    advanced = {name: bool(options.get("advanced")) for name, (_, options) in optional.items()}
    widgets = {name: is_widget(spec) for name, spec in optional.items()}
    expected = widgets if declared["required"] else dict.fromkeys(optional, False)
    assert advanced == {**expected, **({"preset": False} if "preset" in optional else {})}


@every_node
def test_the_function_takes_all_inputs_and_needs_only_the_required(node_id: str) -> None:
    node = NODES[node_id]
    declared = node.INPUT_TYPES()
    signature = inspect.signature(getattr(node(), node.FUNCTION))
    signature.bind(**dict.fromkeys(declared["required"]))
    signature.bind(**dict.fromkeys([*inputs_of(node), *declared.get("hidden", {})]))


@every_node
def test_help_page_names_every_input_and_output(node_id: str) -> None:
    page = (ROOT / "web/docs" / f"{node_id}.md").read_text(encoding="utf-8")
    for name in [*inputs_of(NODES[node_id]), *NODES[node_id].RETURN_NAMES]:
        assert f"\n- **{name}**: " in page, f"{node_id}.md does not explain {name}"


def test_only_generation_has_a_seed_that_moves() -> None:
    """The page moves every INT of these names that does not say otherwise."""
    moves = {
        node_id: options.get("control_after_generate", "unsaid")
        for node_id, node in NODES.items()
        for name, (_, options) in inputs_of(node).items()
        if name in ("seed", "noise_seed") or "control_after_generate" in options
    }
    fixed = ("TrainSDXLLoRA", "MergeLoRAs", "CompareLoRAs", "PickCheckpoint", "FindStrength")
    assert moves == {"SDXLGenerateCached": True, **dict.fromkeys(fixed, False)}


# Graphs that users have saved


def saved_inputs() -> dict[str, list[list[str]]]:
    """The inputs that each node of tests/saved holds, by the node's id."""
    found: dict[str, list[list[str]]] = {}
    for path in sorted((ROOT / "tests/saved").glob("*.json")):
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            found.setdefault(node["class_type"], []).append(list(node["inputs"]))
    return found


@every_node
def test_saved_graphs_use_every_node_and_what_they_hold_comes_first(node_id: str) -> None:
    """The files there spell the inputs in their order. A new node needs a new file: the old ones are never edited."""
    saved = saved_inputs().get(node_id, [])
    assert saved, f"no graph in tests/saved uses {node_id}: add one that spells its inputs"
    names = list(inputs_of(NODES[node_id]))
    held = {name for inputs in saved for name in inputs}
    assert set(names[: len(held)]) == held, "new inputs go to the end of the optional ones"
    for inputs in saved:
        assert inputs == [name for name in names if name in inputs]


@pytest.mark.parametrize(
    ("word", "node_ids"),
    {
        "kohya": {"TrainSDXLLoRA", "LoadCaptionDataset"},
        "dreambooth": {"TrainSDXLLoRA"},
        "trigger": {"LoadLoRA"},
        "captions": {"LoadCaptionDataset"},
        "compare": {"SDXLGenerateCached", "CLIPScore"},
    }.items(),
)
def test_a_search_finds_the_node_that_serves(word: str, node_ids: set[str]) -> None:
    assert node_ids <= {name for name, node in NODES.items() if any(word in alias for alias in node.SEARCH_ALIASES)}
