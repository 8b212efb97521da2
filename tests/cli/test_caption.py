"""`sdxl-lora caption` on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_lora_core.cli.main import main
from tests.micro.captioners import write_onnx_tagger, write_pictures


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["caption", *map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().out


def test_a_tagger_then_a_file_of_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "mine", tmp_path / "wd"
    write_pictures(folder, 3)
    write_onnx_tagger(model)
    said = call(capsys, folder, "--captioner", model, "--set", "tag_threshold=0.01", "--set", "trigger_word=ohwx")
    assert said == "3 captions written, 0 kept, 0 of them written by hand.\n"
    assert (folder / "00.txt").read_text().startswith("ohwx, ")
    lines = tmp_path / "lines.txt"
    lines.write_text("a\nb\nc\n", encoding="utf-8")
    call(capsys, folder, "--captions", lines, "--set", "existing=replace_generated")
    assert [(folder / f"0{n}.txt").read_text() for n in range(3)] == ["a", "b", "c"]


def test_a_wrong_setting_or_folder_is_one_sentence(tmp_path: Path) -> None:
    write_pictures(tmp_path / "mine", 1)
    with pytest.raises(SystemExit, match="sdxl-lora: unknown setting length; known are batch_size"):
        main(["caption", str(tmp_path / "mine"), "--captioner", str(tmp_path), "--set", "length=3"])
    with pytest.raises(SystemExit, match="has no config.json: use a folder with a captioning model or a tagger"):
        main(["caption", str(tmp_path / "mine"), "--captioner", str(tmp_path)])
