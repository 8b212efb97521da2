from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdxl_lora_core.settings import declared, fields_of
from sdxl_lora_core.training.config.presets import PRESETS, with_preset
from sdxl_lora_core.training.config.train_config import TrainConfig
from tools.make_docs import pages
from tools.run_workflow import ROOT, load_pack

PACK: Any = load_pack()
OPTIONS: Any = PACK.nodes.train_options
NODES = {name: node for name, node in PACK.NODE_CLASS_MAPPINGS.items() if issubclass(node, OPTIONS.TrainOptions)}
FIELDS = fields_of(TrainConfig)


def test_every_setting_is_on_one_node_and_explained() -> None:
    training = PACK.NODE_CLASS_MAPPINGS["TrainSDXLLoRA"].INPUT_TYPES()
    shown = [*training["required"], *training["optional"]]
    shown += [name for node in NODES.values() for name in node.settings()]
    assert sorted(name for name in shown if name in FIELDS) == sorted(FIELDS)
    assert all(len(declared(TrainConfig, name).help) > 20 for name in FIELDS)


@pytest.mark.parametrize("node_id", PACK.NODE_CLASS_MAPPINGS)
def test_help_pages_are_current(node_id: str) -> None:
    page = (ROOT / "web/docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page == pages()[node_id], "run python -m tools.make_docs"
    assert "\n## Common mistakes\n\n- **" in page


def test_only_changed_settings_travel_and_the_later_node_wins() -> None:
    (first,) = OPTIONS.OptimizerOptions().collect(weight_decay=0.5, adam_beta1=0.9)
    assert first == {"weight_decay": 0.5}
    (second,) = OPTIONS.LossOptions().collect(options=first, snr_gamma=5.0)
    assert second == {"weight_decay": 0.5, "snr_gamma": 5.0} and first == {"weight_decay": 0.5}
    (third,) = OPTIONS.OptimizerOptions().collect(options=second, weight_decay=0.2)
    assert third["weight_decay"] == 0.2


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_a_preset_fills_what_stands_at_its_default(preset: Any) -> None:
    config, left_out = PACK.nodes.widgets.train_config(None, {"sample_prompts": "a picture"}, preset)
    assert left_out == []
    assert {name: getattr(config, name) for name in PRESETS[preset]} == dict(PRESETS[preset])
    assert any(value != FIELDS[name].default for name, value in PRESETS[preset].items())


def test_what_was_changed_wins_over_the_preset() -> None:
    assert with_preset({"rank": 4}, "style")[0]["rank"] == 4
    assert PACK.nodes.widgets.train_config({"noise_offset": 0.1}, {"rank": 4}, "style")[0].noise_offset == 0.1


def test_what_of_a_preset_does_not_fit_is_left_out_and_named() -> None:
    filled, left_out = with_preset({"debiased": True, "steps": 20}, "style")
    assert "snr_gamma" not in filled and "lr_warmup_steps" not in filled and filled["rank"] == 16
    assert left_out == [
        "preset style: lr_warmup_steps 50 is left out, because lr_warmup_steps is 50 and steps is 20: the warm-up must "
        "be shorter",
        "preset style: snr_gamma 5.0 is left out, because snr_gamma is 5.0 and debiased is on: both weight the "
        "timesteps, so turn one of them off",
    ]


@pytest.mark.parametrize(
    ("node_id", "setting", "bundled", "folder"),
    [
        ("AdapterOptions", "continue_from", "8bit_style (bundled)", "models/loras"),
        ("WatchOptions", "clip_model", "tiny-clip (bundled)", "models/clip_score"),
    ],
)
def test_files_are_chosen_from_a_list_that_may_be_older_than_they_are(
    node_id: str, setting: str, bundled: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    node: Any = NODES[node_id]
    choices, shown = node.INPUT_TYPES()["optional"][setting]
    assert (choices[0], shown["default"]) == ("(none)", "(none)") and bundled in choices
    for value in ("(none)", ""):  # "" is what graphs hold that were saved when it was a text
        assert node.VALIDATE_INPUTS(**{setting: value}) is True
        assert node().collect(**{setting: value}) == ({},)
    assert node.VALIDATE_INPUTS(**{setting: bundled}) is True
    assert node().collect(**{setting: bundled}) == ({setting: bundled},)

    assert "'later' was not found" in node.VALIDATE_INPUTS(**{setting: "later"})
    before = node.IS_CHANGED(**{setting: "later"})
    (tmp_path / folder / "later").mkdir(parents=True)
    assert node.VALIDATE_INPUTS(**{setting: "later"}) is True
    assert node.IS_CHANGED(**{setting: "later"}) != before
    assert node.VALIDATE_INPUTS() is True and node.IS_CHANGED() == ""
