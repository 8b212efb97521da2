"""What earlier versions wrote is still found and read. The stored values in tests/guards are those of version 0.3.0.

A failure here means that a user's finished runs, checkpoints or cached images would be lost with an update: change the
code, not the stored values. tests/guards/cases.py says how they were made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.torch import load_file

from sdxl_lora_core.cli.main import main
from sdxl_lora_core.cli.run_file import read_run
from sdxl_lora_core.safetensors_file import read_header
from sdxl_lora_core.settings import Range, from_mapping, setting
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.lora_metadata import lora_metadata
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.run.loop_state import Evaluation, LoopState
from sdxl_lora_core.training.train import TrainResult
from tests.guards.cases import (
    GUARDS,
    base,
    dataset,
    dataset_fingerprints,
    fingerprint,
    image_keys,
    libraries_of_0_3_0,
    run_fingerprints,
)
from tests.guards.runs import FINISHED, HALFWAY, HOME, IMAGE, ROOT, SETTINGS, SOMEWHERE, STEPS_DONE, trained
from tools.run_workflow import run


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def stored(name: str) -> Any:
    return read_json(GUARDS / f"{name}.json")


# Fingerprints and keys


def test_data_sets_have_the_fingerprints_of_0_3_0() -> None:
    assert dataset_fingerprints() == stored("dataset_fingerprints")


def test_runs_are_found_by_the_fingerprints_of_0_3_0() -> None:
    assert run_fingerprints() == stored("run_fingerprints")


def test_images_have_the_keys_of_0_3_0() -> None:
    assert image_keys() == stored("image_keys")


@dataclass(frozen=True, kw_only=True)
class LaterConfig(TrainConfig):
    """As if a later version had added two settings, one of them outside of the fingerprint."""

    OUTSIDE_FINGERPRINT = (*TrainConfig.OUTSIDE_FINGERPRINT, "shown")
    sharpness: float = setting(0.0, "How sharp.", Range(0, 1), since="0.4.0")
    shown: bool = setting(False, "Whether it is shown.", since="0.4.0")


@pytest.mark.parametrize("changes", [{}, {"rank": 16, "seed": 3}], ids=str)
def test_a_setting_added_later_leaves_fingerprints_as_they_were_while_it_stands_at_its_default(
    changes: dict[str, Any],
) -> None:
    model, pictures = base(), dataset("masks")
    earlier = fingerprint(model, pictures, TrainConfig(**changes))
    assert fingerprint(model, pictures, LaterConfig(**changes)) == earlier
    assert fingerprint(model, pictures, LaterConfig(**changes, shown=True)) == earlier
    assert fingerprint(model, pictures, LaterConfig(**changes, sharpness=0.5)) != earlier


# A run's files


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what 0.3.0 left, with the library versions of then, which stand in the names of cached files."""
    folder = tmp_path_factory.mktemp("guards") / "home"
    shutil.copytree(HOME, folder)
    for settings in folder.rglob("run.yaml"):  # the stored ones name no folder of this machine
        text = settings.read_text(encoding="utf-8")
        settings.write_text(text.replace(SOMEWHERE, ROOT.as_posix()), encoding="utf-8")
    with libraries_of_0_3_0():
        yield folder


class Continued(NamedTuple):
    """The settings of the run that 0.3.0 left half-way, trained by the code of today.

    Its steps are rounded in another way, so that it does not go on from that checkpoint but begins anew.
    """

    result: TrainResult
    folder: Path
    reports: list[StepReport]

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints/step-000004"


@pytest.fixture(scope="module")
def continued(home: Path) -> Continued:
    reports: list[StepReport] = []
    result = trained(home, HALFWAY, reports.append)
    return Continued(result, home / "lora_runs" / Path(result.lora_name).stem, reports)


def cached(home: Path) -> dict[str, tuple[int, bytes]]:
    """When each cached file of a training was written, and its content. A copy has its original's time."""
    kept = home / "user/sdxl_lora"
    files = [file for kind in ("latents", "prompts") for file in (kept / kind).rglob("*") if file.is_file()]
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def state_of(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / "state.json")


def section(home: Path, run: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((home / f"lora_runs/{run}/run.yaml").read_text(encoding="utf-8"))[name]


def test_a_run_finished_by_0_3_0_is_found_again(home: Path) -> None:
    reports: list[StepReport] = []
    result = trained(home, FINISHED, reports.append)
    assert result.reused and result.lora_name == "guard.safetensors" and not reports
    assert json.loads(result.report.to_json()) == {**read_json(HOME / "lora_runs/guard/report.json"), "reused": True}
    assert result.lora_path.read_bytes() == (HOME / "loras/guard.safetensors").read_bytes()


def test_the_command_line_finds_it_again_by_its_run_yaml(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = home / "lora_runs/guard/run.yaml"
    main(["train", str(settings), "--output", str(home), "--home", str(home / "user/sdxl_lora"), "--device", "cpu"])
    report, _, path = capsys.readouterr().out.strip().rpartition("\n")
    assert json.loads(report)["reused"] and Path(path) == home / "loras/guard.safetensors"


@pytest.mark.parametrize(("name", "settings"), [("guard", FINISHED), ("settings", SETTINGS)])
def test_a_run_yaml_of_0_3_0_is_read_as_it_was_meant(home: Path, name: str, settings: TrainConfig) -> None:
    job = read_run(home / f"lora_runs/{name}/run.yaml", None)
    assert job.config == settings
    assert fingerprint(job.base, job.dataset, job.config) == section(home, name, "run")["fingerprint"]


def test_a_run_yaml_without_a_setting_added_later_gives_the_same_run(home: Path) -> None:
    job = read_run(home / "lora_runs/guard/run.yaml", None)
    later = from_mapping(LaterConfig, section(home, "guard", "train"), "train")
    assert fingerprint(job.base, job.dataset, later) == section(home, "guard", "run")["fingerprint"]


def test_more_steps_begin_anew_and_leave_the_run_finished_by_0_3_0(home: Path) -> None:
    before = {file: file.read_bytes() for file in (home / "lora_runs/guard").rglob("*") if file.is_file()}
    result = trained(home, replace(FINISHED, steps=FINISHED.steps + 1), lambda report: None)
    assert result.report.steps == FINISHED.steps + 1 and result.report.continued is None
    assert result.lora_name != "guard.safetensors"
    assert {file: file.read_bytes() for file in before} == before


def test_a_run_that_0_3_0_left_half_way_is_kept_and_trained_anew(home: Path, continued: Continued) -> None:
    assert [report.done for report in continued.reports if report.phase == "training"] == [1, 2, 3, 4]
    name = Path(continued.result.lora_name).stem
    assert not continued.result.reused and name.startswith("halfway_0000")
    assert continued.result.report.note == f"the name halfway was taken, so this LoRA is {name}"
    theirs = HOME / f"lora_runs/halfway/checkpoints/step-{STEPS_DONE:06d}"
    for file in theirs.iterdir():
        assert (home / file.relative_to(HOME)).read_bytes() == file.read_bytes(), file.name


def test_its_steps_are_those_of_the_run_that_0_3_0_finished(continued: Continued) -> None:
    """But for the rounding of another processor. Weights, moments, noise, order and captions have to be the same."""
    reference = HOME / "lora_runs/guard/checkpoints/step-000004"
    ours, theirs = (state_of(checkpoint)["loop"] for checkpoint in (continued.last, reference))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert ours["learning_rates"] == theirs["learning_rates"]
    measured = [[look["validation_loss"] for look in loop["looks"]] for loop in (ours, theirs)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)
    learned, wanted = (load_file(checkpoint / "adapter.safetensors") for checkpoint in (continued.last, reference))
    assert {name: value.shape for name, value in learned.items()} == {n: value.shape for n, value in wanted.items()}
    away = torch.cat([(learned[name] - wanted[name]).flatten() for name in wanted]).norm()
    assert away < 0.02 * torch.cat([value.flatten() for value in wanted.values()]).norm()


def test_latents_and_prompts_cached_by_0_3_0_are_used(home: Path, continued: Continued) -> None:
    assert cached(home) == cached(HOME), "a file was added or written anew"
    assert not any(report.phase.startswith("encoding") for report in continued.reports)


# Images


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the stored image was made; the kind of device is in its key."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def drawn(home: Path, **changes: Any) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """The image of the stored graph, what is said of it, and its latents."""
    node = {**IMAGE["3"], "inputs": {**IMAGE["3"]["inputs"], **changes}}
    images, info, _, latents = (values[0] for values in run({**IMAGE, "3": node}, home)["3"])
    (facts,) = json.loads(info)
    return images[0], facts, latents["samples"][0]


def test_an_image_cached_by_0_3_0_is_found_by_the_same_graph(home: Path, on_the_cpu: None) -> None:
    pixels, facts, latents = drawn(home, cache="only")
    entry = next((HOME / "user/sdxl_lora/images").rglob("manifest.json")).parent
    assert facts["from_cache"] and facts["key"] == entry.name
    assert torch.equal(latents, load_file(entry / "latents.safetensors")["latents"])
    stored_pixels = torch.from_numpy(np.asarray(Image.open(entry / "image.png")).copy())
    assert torch.equal((pixels * 255).round().to(torch.uint8), stored_pixels)
    found = home / entry.relative_to(HOME)
    for file in entry.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def test_prompts_cached_by_0_3_0_serve_another_image(home: Path, on_the_cpu: None) -> None:
    _, facts, _ = drawn(home, seed=4, steps=1)
    assert not facts["from_cache"] and cached(home) == cached(HOME)


# Names in files: they stay when code is renamed. More may be added; a name that is gone or new in the place of another
# would be missed by whoever reads files of both versions.


def test_the_names_in_a_checkpoint_stay(continued: Continued) -> None:
    document = state_of(continued.last)
    assert set(document) == {"schema", "fingerprint", "loop", "scaler", "optimizer", "sha256", "seal"}
    assert set(document["sha256"]) == {"adapter.safetensors", "state.safetensors"}
    assert (
        set(document["loop"])
        == {field.name for field in fields(LoopState)}
        == {
            "step",
            "losses",
            "learning_rates",
            "skipped",
            "looks",
            "checkpoints",
            "images_per_pass",
            "gradient_checkpointing",
            "base_weights",
            "offloaded_blocks",
            "memory",
            "schedule_start",
            "continued_from",
            "seconds",
            "resumed",
            "image_losses",
        }
    )
    look = {"step", "validation_loss", "clip_scores"}
    assert [set(seen) for seen in document["loop"]["looks"]] == [look] * 3
    assert {field.name for field in fields(Evaluation)} == look
    flat = {"weight.0", *(f"optimizer.state.0.{name}" for name in ("step", "exp_avg", "exp_avg_sq"))}
    assert flat < set(load_file(continued.last / "state.safetensors"))


def test_the_names_in_a_run_folder_stay(continued: Continued) -> None:
    names = {file.name for file in continued.folder.iterdir()} - {".lock"}
    assert names == {
        "run.yaml",
        "report.json",
        "metrics.csv",
        "loss.png",
        "identity",
        "finished",
        "checkpoints",
        "images.json",
    }
    assert set(read_json(continued.folder / "identity")) == {"fingerprint", "steps", "kept", "format"}
    header, *_ = (continued.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert header == "step,loss,smoothed,learning_rate,validation_loss,images_per_second,memory"


def test_the_names_in_a_run_yaml_stay(home: Path, continued: Continued) -> None:
    ours = yaml.safe_load((continued.folder / "run.yaml").read_text(encoding="utf-8"))
    theirs = yaml.safe_load((HOME / "lora_runs/guard/run.yaml").read_text(encoding="utf-8"))
    assert set(ours) == set(theirs) == {"base", "datasets", "validation", "train", "run"}
    for name in ("base", "train", "run"):
        later = {"save_every", "image_losses", "base_weights", "offload_blocks"} if name == "train" else set()
        assert set(ours[name]) == set(theirs[name]) | later, name
    assert [set(data) for data in ours["datasets"]] == [set(data) for data in theirs["datasets"]]


def test_the_names_in_a_report_stay(continued: Continued) -> None:
    written = read_json(continued.folder / "report.json")
    assert set(written) == {
        "lora",
        "base",
        "images",
        "steps",
        "epochs",
        "loss",
        "modules",
        "adapter",
        "rank",
        "trigger_words",
        "memory",
        "skipped_steps",
        "skipped_files",
        "validation_loss",
        "validation_loss_before",
        "kept",
        "note",
    }
    assert set(json.loads(continued.result.report.to_json())) == {*written, "reused"}


def test_the_names_of_an_images_facts_stay(home: Path, on_the_cpu: None) -> None:
    _, facts, _ = drawn(home, cache="only")
    assert set(facts) == {"prompt", "seed", "key", "from_cache", "seconds"}
    _, made, _ = drawn(home, seed=5, steps=1)
    theirs, ours = (next((home / "user/sdxl_lora/images").rglob(key)) for key in (facts["key"], made["key"]))
    assert {file.name for file in ours.iterdir()} == {"image.png", "latents.safetensors", "manifest.json"}
    manifest, reference = (read_json(entry / "manifest.json") for entry in (ours, theirs))
    assert set(manifest) == {"schema", "key", "size", "sha256", "latents", "settings", "versions", "lora_fit"}
    assert set(manifest) - set(reference) == {"lora_fit"}, "since 0.4"
    assert set(manifest["settings"]) == set(reference["settings"])
    texts, stored_texts = (PngImageFile(entry / "image.png").text for entry in (ours, theirs))
    assert set(texts) == set(stored_texts) == {"parameters", "XML:com.adobe.xmp"}


def test_the_names_in_a_loras_metadata_stay(continued: Continued) -> None:
    ours, theirs = (read_header(path) for path in (continued.result.lora_path, HOME / "loras/guard.safetensors"))
    assert set(ours.metadata) == set(theirs.metadata) and ours.shapes == theirs.shapes
    more = lora_metadata(TrainingJob(base(), dataset("trigger word"), SETTINGS), "a", 1, torch.float32)
    assert set(more) - set(theirs.metadata) == {
        "modelspec.trigger_phrase",
        "ss_text_encoder_lr",
        "ss_loss_type",
        "ss_huber_c",
        "ss_min_snr_gamma",
        "ss_shuffle_caption",
        "ss_keep_tokens",
    }
