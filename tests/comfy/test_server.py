"""The pack inside a real ComfyUI, through its HTTP interface."""

from __future__ import annotations

import json
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tools.templates import TEMPLATES

IDS = ["LoadCaptionDataset", "LoadSDXLBase", "TrainSDXLLoRA", "LoadLoRA", "SDXLGenerateCached", "CLIPScore"]
WORKFLOWS = ["generate_with_lora_stack", "score_images", "train_and_compare", "train_and_watch"]

Workflow = dict[str, dict[str, Any]]
Shrink = Callable[..., Workflow]


def job(**inputs: dict[str, Any]) -> Workflow:
    """base -> dataset -> training -> generation, with some inputs changed."""
    workflow: Workflow = {
        "base": {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "auto"}},
        "dataset": {
            "class_type": "LoadCaptionDataset",
            "inputs": {
                "folder": "sample: 8-bit (bundled)",
                "trigger_word": "",
                "resolution": 64,
                "validation_percent": 0,
            },
        },
        "train": {
            "class_type": "TrainSDXLLoRA",
            "inputs": {
                "base": ["base", 0],
                "dataset": ["dataset", 0],
                "lora_name": "job",
                "steps": 3,
                "learning_rate": 1e-3,
                "rank": 2,
                "alpha": 2.0,
                "batch_size": 1,
                "seed": 0,
                "sample_prompts": "",
            },
        },
    }
    for name, changes in inputs.items():
        workflow[name]["inputs"].update(changes)
    return workflow


def picture(lora_stack: Any = None, **changes: Any) -> Workflow:
    inputs = {
        "base": ["base", 0],
        "prompt": "a red circle on a sky background",
        "negative_prompt": "",
        "seed": 1,
        "steps": 2,
        "guidance": 5.0,
        "width": 64,
        "height": 64,
        "count": 1,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "use",
        **changes,
    }
    if lora_stack:
        inputs["lora_stack"] = lora_stack
    return {"base": job()["base"], "picture": {"class_type": "SDXLGenerateCached", "inputs": inputs}}


def report_of(outputs: dict[str, Any]) -> dict[str, Any]:
    """The training's report."""
    return json.loads(outputs["train"]["sdxl_lora_report"][0])


def seen_in(output: dict[str, Any]) -> list[str]:
    """A name for each image that a node shows: the digits of its pixels, with which the names of previews begin."""
    return [image["filename"][:24] for image in output["images"]]


def test_the_pack_loads_without_a_warning(server: Any) -> None:
    log = server.text().partition("got prompt")[0]  # other tests' prompts may have failed on purpose
    assert re.search(r"seconds: .*sdxl-lora-nodes\n", log), log
    assert "(IMPORT FAILED): " + str(server.base) not in log
    assert "sdxl-lora-nodes/" not in log, "a traceback names a file of the pack"


def test_all_nodes_are_offered_with_their_texts(server: Any) -> None:
    nodes = server.get("/object_info")
    for node_id in IDS:
        info = nodes[node_id]
        assert info["category"] == "SDXL LoRA" and info["description"]
        assert info["python_module"].endswith("sdxl-lora-nodes")
        assert len(info["output_tooltips"]) == len(info["output"])


def test_help_and_templates_are_served(server: Any) -> None:
    assert sorted(server.get("/workflow_templates")["sdxl-lora-nodes"]) == sorted(TEMPLATES)
    assert "/extensions/sdxl-lora-nodes/nodes.js" in server.get("/extensions")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_shipped_workflow_runs(server: Any, shipped: dict[str, Workflow], shrink: Shrink, name: str) -> None:
    outputs = server.run(shrink(shipped[name]))
    for key, node in shipped[name].items():
        if node["class_type"] in ("SDXLGenerateCached", "CLIPScore", "SaveImage", "PreviewImage"):
            assert outputs[key]["images"], f"node {key} shows nothing"


def test_without_comfyuis_cache_of_outputs(
    start_server: Callable[..., Any], shipped: dict[str, Workflow], shrink: Shrink, tmp_path: Path
) -> None:
    """With --cache-none every node runs each time, and its outputs are gone once all nodes behind it have used them."""
    workflow = shrink(shipped["train_and_compare"])
    with start_server(tmp_path / "comfy", "--cache-none") as server:
        first, again = server.run(workflow), server.run(workflow)
    scored = [key for key, node in workflow.items() if node["class_type"] == "CLIPScore"]
    assert scored and [seen_in(again[key]) for key in scored] == [seen_in(first[key]) for key in scored]
    assert len(list((tmp_path / "comfy/output/loras").glob("*.safetensors"))) == 1


def test_training_after_generation_and_the_reverse_in_one_process(server: Any) -> None:
    server.run(picture(seed=11))
    outputs = server.run(job(train={"lora_name": "after", "sample_prompts": "a red star"}))
    report = report_of(outputs)
    assert report["steps"] == 3 and report["loss"] > 0
    assert len(outputs["train"]["images"]) == 2, "the chart and one sample"
    plain = server.run(picture(seed=12))["picture"]
    styled = server.run({**picture(["train", 0], seed=12), **job(train={"lora_name": "after"})})["picture"]
    assert seen_in(plain) != seen_in(styled)


def test_second_run_finds_everything_again(server: Any) -> None:
    workflow = {**picture(["train", 0], seed=21), **job(train={"lora_name": "again"})}
    server.run(workflow)
    server.run(picture(seed=22))  # makes ComfyUI forget the outputs of nodes that are not in this prompt
    second = server.run(workflow)
    assert report_of(second)["reused"] is True
    assert "1 from the cache" in second["picture"]["text"][0]
    assert not (server.base / "output/loras/again_00002.safetensors").exists()


def test_unloaded_models_come_back(server: Any) -> None:
    first = server.run(picture(seed=31, cache="off"))
    seen = len(server.text())
    server.post("/free", {"unload_models": True})
    for _ in range(2):  # ComfyUI may take the first prompt before it unloads
        again = server.run(picture(seed=31, cache="refresh"))
        assert seen_in(first["picture"]) == seen_in(again["picture"])
    assert "Requested to load SDXLPart" in server.text()[seen:], "the models were never unloaded"


def test_cancelled_training_continues_where_it_stopped(server: Any) -> None:
    workflow = job(train={"lora_name": "cancelled", "steps": 60})
    seen = len(server.text())
    prompt = server.queue(workflow)
    server.wait(lambda: max(_steps(server.text()[seen:]), default=0) >= 5, 120)
    server.post("/interrupt", {})
    entry = server.finished(prompt)
    assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    run = server.base / "output/lora_runs/cancelled"
    assert list((run / "checkpoints").iterdir()), "nothing was saved"
    assert not (server.base / "output/loras/cancelled.safetensors").exists()

    server.run(picture(seed=41))
    seen = len(server.text())
    server.run(workflow)
    assert min(_steps(server.text()[seen:])) >= 5, "training began anew"
    assert (server.base / "output/loras/cancelled.safetensors").exists()


def _steps(log: str, total: int = 60) -> list[int]:
    """The step numbers that the training bar has shown, the empty bar left out."""
    return [int(step) for step in re.findall(rf"training: .*?\| (\d+)/{total}", log) if step != "0"]


def test_a_stopped_training_is_kept_and_goes_on_with_more_steps(server: Any) -> None:
    workflow = {**picture(["train", 0], seed=61), **job(train={"lora_name": "stopped", "steps": 50})}
    seen = len(server.text())
    prompt = server.queue(workflow)
    server.wait(lambda: max(_steps(server.text()[seen:], 50), default=0) >= 3, 120)
    assert server.post("/sdxl_lora/stop", {}) == {"stopping": True}
    entry = server.finished(prompt)
    assert entry["status"]["status_str"] == "success"
    report = report_of(entry["outputs"])
    assert report["steps"] < 50 and "stopped on request" in report["stopped"]
    assert entry["outputs"]["picture"]["images"], "what hangs on the training did not run"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post("/sdxl_lora/stop", {})
    assert refusal.value.code == 409

    outputs = server.run(workflow)
    assert "train" not in outputs or report_of(outputs)["steps"] == report["steps"], "trained on"
    longer = {**picture(["train", 0], seed=61), **job(train={"lora_name": "stopped", "steps": 51})}
    rest = report_of(server.run(longer))
    assert rest["steps"] == 51 and "stopped" not in rest and rest["lora"] == "stopped_00002.safetensors"
    assert "the first steps are those of stopped" in rest["continued"]


def test_a_new_lora_is_offered_by_comfyui_and_by_us(server: Any) -> None:
    server.run(job(train={"lora_name": "offered"}))
    for node in ("LoraLoader", "LoadLoRA"):
        names = server.get(f"/object_info/{node}")[node]["input"]["required"]["lora_name"][0]
        assert "offered.safetensors" in names


def test_a_lora_trained_in_the_graph_is_weighted(server: Any) -> None:
    weigh = {
        "class_type": "LoadLoRA",
        "inputs": {
            "lora_name": "(incoming)",
            "strength_model": 0.5,
            "strength_clip": 0.5,
            "enabled": True,
            "lora_stack": ["train", 0],
        },
    }
    outputs = server.run({**picture(["weigh", 0], seed=51), **job(train={"lora_name": "weighted"}), "weigh": weigh})
    assert outputs["picture"]["images"]
    assert "is off" not in outputs["weigh"]["text"][0]


def test_a_lora_made_since_the_page_was_loaded_is_trained_further(server: Any) -> None:
    def further(file: str) -> Workflow:
        workflow = job(train={"lora_name": "further", "options": ["options", 0]})
        return {**workflow, "options": {"class_type": "AdapterOptions", "inputs": {"continue_from": file}}}

    assert "'made_now.safetensors' was not found" in server.refused(further("made_now.safetensors"))
    alone = report_of(server.run(further("")))  # as graphs have it that are older than the list
    server.run(job(train={"lora_name": "made_now"}))
    continued = report_of(server.run(further("made_now.safetensors")))
    assert (alone["lora"], continued["lora"]) == ("further.safetensors", "further_00002.safetensors")


def folder_with(server: Any, name: str, files: dict[str, bytes]) -> str:
    folder: Path = server.base / "input" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return name


@pytest.fixture(scope="session")
def png(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("png") / "a.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(path)
    return path.read_bytes()


def test_datasets_that_cannot_be_used(server: Any, png: bytes) -> None:
    loras = sorted((server.base / "output").rglob("*.safetensors"))
    empty = folder_with(server, "empty", {})
    broken = folder_with(server, "broken", {"a.png": png[:60], "a.txt": b"a caption", "b.png": b"", "b.txt": b"other"})
    assert "empty" in server.failure(job(dataset={"folder": empty}))
    message = server.failure(job(dataset={"folder": broken}))
    assert "a.png" in message and "b.png" in message
    assert "valid relative path" in server.refused(job(dataset={"folder": "../models"}))
    assert "was not found" in server.refused(job(dataset={"folder": "nowhere"}))
    assert sorted((server.base / "output").rglob("*.safetensors")) == loras


def test_captions_in_utf_16_are_read_or_named(server: Any, png: bytes) -> None:
    files = {"a.png": png, "a.txt": "ein Kreis".encode("utf-16"), "b.png": png, "b.txt": "a ring".encode("utf-16-le")}
    outputs = server.run(job(dataset={"folder": folder_with(server, "utf16", files)}, train={"lora_name": "utf16"}))
    report = outputs["dataset"]["text"][0]
    assert "1 image to train on" in report
    assert re.search(r"b\.(png|txt).*UTF-16 without a byte order mark", report), report


def test_models_of_another_kind(server: Any) -> None:
    checkpoints, loras = server.base / "models/checkpoints", server.base / "models/loras"
    for folder in (checkpoints, loras):
        folder.mkdir(exist_ok=True)
    unet = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    text = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    save_file({unet: torch.zeros(320, 768), text: torch.zeros(3072, 768)}, checkpoints / "sd15.safetensors")
    assert "a Stable Diffusion 1.x checkpoint" in server.failure(job(base={"base": "sd15.safetensors"}))
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weights = {f"{key}.lora_down.weight": torch.zeros(4, 768), f"{key}.lora_up.weight": torch.zeros(320, 4)}
    save_file(weights, loras / "sd15-lora.safetensors")
    load = {
        "class_type": "LoadLoRA",
        "inputs": {
            "lora_name": "sd15-lora.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
            "enabled": True,
        },
    }
    assert "a Stable Diffusion 1.x LoRA" in server.failure({**picture(["load", 0]), "load": load})


def test_settings_out_of_range(server: Any) -> None:
    assert "width is 1001: use a multiple of 8" in server.failure(picture(width=1001))
    assert "Value 0 smaller than min of 1" in server.refused(job(train={"steps": 0}))
    assert "lora_name is 'a/b'" in server.failure(job(train={"lora_name": "a/b"}))
    assert "lora_name" in server.failure(job(train={"lora_name": "../../a"}))
