"""A VAE in place of the base's: read in every form, refused by name, used by generating and training alike."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdxl_lora_core.cli.run_file import read_run
from sdxl_lora_core.sdxl.base import SDXLBase, describe_base, load_part, open_base
from sdxl_lora_core.sdxl.checkpoint_names import published_names
from sdxl_lora_core.sdxl.vae_override import with_vae
from tests.micro.images import draw, edit_json, pixels, settings
from tests.micro.runs import Train, Trained, weights
from tools.run_workflow import load_pack

NODES = load_pack().NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def other(micro_sdxl: Path) -> dict[str, Tensor]:
    """The weights of a VAE that is not the base's."""
    vae = load_part(open_base(micro_sdxl), "vae", torch.float32)
    noise = torch.Generator().manual_seed(7)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for name, tensor in vae.state_dict().items()
    }


def older(name: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def in_form(form: str, other: dict[str, Tensor], micro_sdxl: Path, folder: Path) -> Path:
    path = folder / f"other_{form}.safetensors"
    published = published_names("vae", other)
    match form:
        case "folder":
            path = folder / "other"
            shutil.copytree(micro_sdxl / "vae", path)
            save_file(other, next(path.glob("*.safetensors")))
        case "diffusers":
            save_file(other, path)
        case "old diffusers":  # before 0.17, whose settings lack the scaling factor of some
            save_file({older(name): tensor for name, tensor in other.items()}, path)
        case "converted half-way":
            names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
            for new, old in names.items():
                published = {re.sub(rf"(attn_1){re.escape(new)}", rf"\1{old}", k): v for k, v in published.items()}
            extra = {"first_stage_model.model_ema.decay": torch.ones(1), "first_stage_model.loss.logvar": torch.ones(1)}
            save_file(published | extra, path)
        case "published":
            save_file({name.removeprefix("first_stage_model."): tensor for name, tensor in published.items()}, path)
        case "checkpoint":
            save_file(published, path)
    return path


@pytest.fixture
def other_file(other: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path) -> Path:
    return in_form("published", other, micro_sdxl, tmp_path)


@pytest.fixture
def rebuilt(other: dict[str, Tensor], micro_copy: Callable[[], Path]) -> SDXLBase:
    """The base with the other VAE in its own folder."""
    folder = micro_copy()
    save_file(other, next((folder / "vae").glob("*.safetensors")))
    return open_base(folder, "fp32")


@pytest.mark.parametrize(
    "form", ["folder", "diffusers", "old diffusers", "published", "checkpoint", "converted half-way"]
)
@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_every_form_is_read_bit_by_bit(
    micro_base: SDXLBase,
    micro_checkpoint: Path,
    other: dict[str, Tensor],
    micro_sdxl: Path,
    tmp_path: Path,
    no_network: None,
    form: str,
    layout: str,
) -> None:
    base = micro_base if layout == "folder" else open_base(micro_checkpoint, configs=micro_sdxl)
    base = with_vae(base, in_form(form, other, micro_sdxl, tmp_path))
    loaded = load_part(base, "vae", torch.float32).state_dict()
    assert loaded.keys() == other.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in other.items())


def test_images_are_those_of_a_base_that_has_the_vae_built_in(
    micro_base: SDXLBase, rebuilt: SDXLBase, other_file: Path
) -> None:
    own, chosen = pixels(micro_base, settings()), pixels(with_vae(micro_base, other_file), settings())
    assert abs(chosen - own).max() > 0
    np.testing.assert_array_equal(chosen, pixels(rebuilt, settings()))


def test_the_vae_is_part_of_what_a_base_is_and_its_name_is_not(
    micro_base: SDXLBase, other_file: Path, tmp_path: Path
) -> None:
    chosen = with_vae(micro_base, other_file)
    shutil.copy(other_file, tmp_path / "renamed.safetensors")
    again = with_vae(micro_base, tmp_path / "renamed.safetensors")
    keys = [draw(base, settings())[0].key for base in (micro_base, chosen, again)]
    assert keys[0] != keys[1] == keys[2]
    assert micro_base.fingerprint != chosen.fingerprint == again.fingerprint
    assert "VAE other_published.safetensors" in describe_base(chosen)
    assert "VAE" not in describe_base(micro_base)


def test_training_learns_from_its_latents_and_is_repeated_with_it(
    run: Train, trained: Trained, micro_base: SDXLBase, rebuilt: SDXLBase, other_file: Path, tmp_path: Path
) -> None:
    chosen = with_vae(micro_base, other_file)
    learned = run(where="chosen", base=chosen)
    assert weights(learned) == weights(run(where="rebuilt", base=rebuilt))
    assert weights(learned) != weights(trained())
    base = read_run(tmp_path / "chosen/runs/small/run.yaml", None).base
    assert base == chosen


def shaped(path: Path, **shapes: tuple[int, ...]) -> Path:
    save_file({f"{name.replace('__', '.')}.weight": torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


def edited(folder: Path, micro_sdxl: Path, **changes: Any) -> Path:
    shutil.copytree(micro_sdxl / "vae", folder)
    edit_json(folder / "config.json", **changes)
    return folder


def test_a_setting_that_is_not_stored_is_diffusers_default(
    micro_base: SDXLBase, micro_copy: Callable[[], Path], micro_sdxl: Path, tmp_path: Path
) -> None:
    folder = micro_copy()
    edit_json(folder / "vae/config.json", scaling_factor=0.18215)
    base = open_base(folder, "fp32")
    old = edited(tmp_path / "old", micro_sdxl)
    settings_file = old / "config.json"
    stored = json.loads(settings_file.read_text())
    del stored["scaling_factor"], stored["latent_channels"]
    settings_file.write_text(json.dumps(stored))
    assert load_part(with_vae(base, old), "vae", torch.float32).config.scaling_factor == 0.18215  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"scaling_factor 0.18215 where the base's VAE has 0.13025"):
        with_vae(micro_base, old)
    shutil.copy(settings_file, folder / "vae/config.json")
    again = with_vae(open_base(folder, "fp32"), old)
    np.testing.assert_array_equal(pixels(again, settings()), pixels(with_vae(base, old), settings()))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda f, m: f / "gone.safetensors", "VAE gone.safetensors does not exist: use a VAE made for SDXL"),
        (lambda f, m: shaped(f / "lora.safetensors", lora_unet_x__lora_down=(4, 8)), "lora.safetensors is .*LoRA"),
        (lambda f, m: shaped(f / "wan.safetensors", encoder__conv_in=(8, 3, 3, 3, 3)), "without encoder.conv_in"),
        (
            lambda f, m: shaped(f / "flux.safetensors", encoder__conv_in=(8, 3, 3, 3), decoder__conv_in=(16, 16, 3, 3)),
            "decoder.conv_in from 16 to 16 channels where the base's VAE goes from 4 to 16",
        ),
        (
            lambda f, m: shaped(
                f / "full.safetensors", encoder__conv_in=(128, 3, 3, 3), decoder__conv_in=(512, 4, 3, 3)
            ),
            "encoder.conv_in from 3 to 128 channels where the base's VAE goes from 3 to 8",
        ),
        (lambda f, m: edited(f / "old", m, scaling_factor=0.18215), "scaling_factor 0.18215 where .* 0.13025"),
        (lambda f, m: edited(f / "play", m, latents_mean=[0, 0, 0, 0]), "as the VAE of Playground"),
        (lambda f, m: edited(f / "tiny", m, _class_name="AutoencoderTiny"), "is a AutoencoderTiny and not"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    micro_base: SDXLBase, micro_sdxl: Path, tmp_path: Path, write: Callable[[Path, Path], Path], said: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        with_vae(micro_base, write(tmp_path, micro_sdxl))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    return tmp_path


def test_the_node_offers_what_lies_in_the_vae_folder(home: Path) -> None:
    node = NODES["LoadSDXLBase"]
    (choices, options) = node.INPUT_TYPES()["optional"]["vae"]
    assert choices == [options["default"]]
    folder = home / "models" / "vae"
    folder.mkdir(parents=True)
    tiny = load_part(node().load("tiny-sdxl (bundled)", "fp32")["result"][0], "vae", torch.float32)
    save_file(tiny.state_dict(), folder / "mine.safetensors")
    assert node.INPUT_TYPES()["optional"]["vae"][0] == [options["default"], "mine.safetensors"]
    chosen, info = node().load("tiny-sdxl (bundled)", "fp32", vae="mine.safetensors")["result"]
    assert chosen.vae == folder / "mine.safetensors" and "VAE mine.safetensors" in info
    assert node().load("tiny-sdxl (bundled)", "fp32", vae=options["default"])["result"][0].vae is None
    before = node.IS_CHANGED("tiny-sdxl (bundled)", "mine.safetensors")
    assert node.IS_CHANGED("tiny-sdxl (bundled)") != before
    save_file({name: tensor + 1 for name, tensor in tiny.state_dict().items()}, folder / "mine.safetensors")
    assert node.IS_CHANGED("tiny-sdxl (bundled)", "mine.safetensors") != before
    assert node.VALIDATE_INPUTS("tiny-sdxl (bundled)", "mine.safetensors") is True
    assert "choose a .safetensors file, or a folder" in str(node.VALIDATE_INPUTS("tiny-sdxl (bundled)", "gone"))
    assert "'gone' was not found" in str(node.VALIDATE_INPUTS("gone", options["default"]))
