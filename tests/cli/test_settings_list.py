"""What the command line says of settings, and changes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora_core.cli.main import main
from sdxl_lora_core.cli.run_file import read_run
from sdxl_lora_core.cli.settings_list import SECTIONS, read_changes
from sdxl_lora_core.settings import declared, fields_of
from sdxl_lora_core.training.config.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["settings", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_listed_with_its_help(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(listed(capsys, section).split())
    for name in fields_of(SECTIONS[section]):
        assert f"{name} = " in words and " ".join(declared(SECTIONS[section], name).help.split()) in words


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("rank", "rank = 8  (whole number, 1 to 1024)"),
        ("lr_schedule", "lr_schedule = constant  (constant, linear, cosine, cosine_with_restarts, polynomial)"),
        ("train_unet", "train_unet = true  (true or false)"),
        ("sample_prompts", "sample_prompts = []  (a list of texts)"),
        ("blocks", "blocks = ''  (text)"),
    ],
)
def test_a_setting_is_shown_as_run_yaml_has_it(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "train", name).splitlines()[0] == line


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(SystemExit, match="unknown setting ranks; known are adam_beta1"):
        main(["settings", "train", "ranks"])


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    base = {"path": str(ROOT / "assets/tiny-sdxl")}
    datasets = [{"folder": str(ROOT / "assets/sample-dataset"), "resolution": 128}]
    file.write_text(yaml.safe_dump({"base": base, "datasets": datasets, "train": {"rank": 4, "steps": 7}}))
    return file


def test_set_overrides_the_settings_of_the_file(run_yaml: Path) -> None:
    changes = read_changes(["rank=16", "learning_rate=2e-4", "sample_prompts=[a cat, a dog]", "train_unet=true"])
    config = read_run(run_yaml, None, changes).config
    assert config == TrainConfig(rank=16, steps=7, learning_rate=2e-4, sample_prompts=("a cat", "a dog"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rank", "--set rank: use NAME=VALUE"),
        ("ranks=2", "run.yaml line 6: train: unknown setting ranks"),
        ("rank=0", "rank is 0: give a value from 1 to 1024"),
        ("rank=high", "^sdxl-lora: run.yaml line 6: train: rank is 'high': give a whole number from 1 to 1024$"),
        ("lora_name=", "^sdxl-lora: run.yaml line 6: train: lora_name is None: give a text$"),
        (
            "lora_name=''",
            "^sdxl-lora: run.yaml line 6: train: lora_name is '': use a name that neither is empty nor b",
        ),
        ("blocks=[", r"^sdxl-lora: --set blocks=\[: '\[' is not a YAML value: put the text in quotes$"),
    ],
)
def test_a_wrong_change_ends_the_command_by_name(run_yaml: Path, change: str, message: str, tmp_path: Path) -> None:
    arguments: list[Any] = ["train", str(run_yaml), "--output", str(tmp_path / "out"), "--set", change]
    with pytest.raises(SystemExit, match=message):
        main(arguments)
    assert not (tmp_path / "out").exists()
