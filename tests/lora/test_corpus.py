"""One LoRA file a dialect, each with SDXL's full set of keys and written by other code than our reader.

The writers are diffusers, peft, LyCORIS, and keys listed by hand from what kohya and old diffusers published; ComfyUI's
own writer is in tests/comfy. The effect is that of the writer's own merging, or of W + alpha / rank * B A in float64.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from tests.micro.deep import (
    PARTS,
    changed,
    deep_parts,
    layer,
    random_factors,
    resnet_layers,
    sai_layers,
    sai_norms,
    text_layers,
    transformer_layers,
    worst_error,
)

TOLERANCE = 1e-6
Wanted = dict[str, Mapping[str, Tensor]]  # by part: the tensors after merging
Writer = Callable[[dict[str, Any], Path], Wanted]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return deep_parts()


def test_the_lists_name_every_layer_of_sdxl(empty_sdxl: dict[str, Any]) -> None:
    kinds = (nn.Linear, nn.Conv2d)
    assert (len(transformer_layers()), len(resnet_layers())) == (722, 66)
    for part, names in (("unet", set(sai_layers().values())), *((p, set(text_layers(p))) for p in PARTS[1:])):
        found = {name for name, module in empty_sdxl[part].named_modules() if isinstance(module, kinds)}
        if part != "unet":
            found = {f"text_model.{name.removeprefix('text_model.')}" for name in found if "layers" in name}
        assert names == found
    norms = {name for name, module in empty_sdxl["unet"].named_modules() if "Norm" in type(module).__name__}
    assert set(sai_norms().values()) == norms


# ------------------------------------------------------------------ by hand


KOHYA = (".lora_down.weight", ".lora_up.weight")
DIFFUSERS_2023 = ("_lora.down.weight", "_lora.up.weight")
DIFFUSERS_2024 = (".lora.down.weight", ".lora.up.weight")
DIFFUSERS_TEXT = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")


def by_hand(
    unet_key: Callable[[str, str], str],
    text_key: Callable[[str, str], str],
    ends: tuple[str, str] = KOHYA,
    text_ends: tuple[str, str] = KOHYA,
    alpha: float | None = 3.0,
    layers: Callable[[], dict[str, str]] = sai_layers,
) -> Writer:
    """`unet_key` makes a key of kohya's name and diffusers' path, `text_key` of the part and diffusers' path."""

    def write(parts: dict[str, Any], path: Path) -> Wanted:
        keys = {("unet", module): unet_key(sai, module) for sai, module in layers().items()}
        keys |= {(part, module): text_key(part, module) for part in PARTS[1:] for module in text_layers(part)}
        tensors: dict[str, Tensor] = {}
        wanted: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for seed, ((part, module), key) in enumerate(keys.items()):
            weight = layer(parts[part], module).weight
            down, up = random_factors(weight, seed)
            down_end, up_end = ends if part == "unet" else text_ends
            tensors |= {key + down_end: down, key + up_end: up}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
            wanted[part][f"{module}.weight"] = changed(weight, down, up, alpha or len(down))
        save_file(tensors, path)
        return {**wanted}

    return write


def flat(path: str) -> str:
    return path.replace(".", "_")


def kohya_text(part: str, path: str) -> str:
    return f"lora_te{PARTS.index(part)}_{flat(path)}"


def diffusers_text(part: str, path: str) -> str:
    return f"{part}.{path}"


def processor(_: str, path: str) -> str:
    """Where diffusers kept a LoRA in 2023: in the processor of its attention."""
    head, _, leaf = path.rpartition(".to_")
    return f"unet.{head}.processor.to_{leaf.removesuffix('.0')}"


def attention_layers() -> dict[str, str]:
    return {sai: path for sai, path in transformer_layers().items() if ".to_" in path}


def kohya_dora(parts: dict[str, Any], path: Path) -> Wanted:
    """dora_scale is over the lengths of W's rows, as ComfyUI and Forge read it."""
    tensors, wanted = {}, {}
    for seed, (sai, module) in enumerate(transformer_layers().items()):
        weight = layer(parts["unet"], module).weight.detach()
        down, up = random_factors(weight, seed)
        scale = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(seed)) + 0.5
        key = f"lora_unet_{sai}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
        tensors[f"{key}.dora_scale"] = scale
        lengths = weight.double().norm(dim=1, keepdim=True)
        wanted[f"{module}.weight"] = changed(weight, down, up, 3.0) * scale.double() / lengths
    save_file(tensors, path)
    return {"unet": wanted}


def kohya_whole(names: tuple[str, str]) -> Writer:
    """Norms and biases, with `names` as the ends of their keys."""

    def write(parts: dict[str, Any], path: Path) -> Wanted:
        tensors, wanted = {}, {}
        for seed, (sai, module) in enumerate(sai_norms().items()):
            for end, leaf in zip(names, ("weight", "bias"), strict=True):
                old = getattr(layer(parts["unet"], module), leaf)
                change = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
                tensors[f"lora_unet_{sai}.{end}"] = change
                wanted[f"{module}.{leaf}"] = old.detach().double() + change.double()
        for part in PARTS[1:]:
            for n in range(len(text_layers(part)) // 6):
                module = f"text_model.encoder.layers.{n}.layer_norm1"
                change = torch.full_like(layer(parts[part], module).weight, 0.25)
                tensors[f"{kohya_text(part, module)}.{names[0]}"] = change
        save_file(tensors, path)
        return {"unet": wanted}

    return write


# ------------------------------------------------------------------ by peft and diffusers


def randomised(model: nn.Module, seed: int) -> None:
    """The trained tensors of a fresh adapter, some of which start at zero, are given values."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(kind in name for kind in ("lora_", "hada_", "lokr_")):
            moved = torch.randn(parameter.shape, generator=draw) * 0.1
            parameter.data.add_(moved)


def by_peft(make_config: Callable[[list[str]], Any], layers: Callable[[], dict[str, str]] = sai_layers) -> Writer:
    """get_peft_model and its save_pretrained, which keeps the alpha in a file beside the weights."""

    def write(parts: dict[str, Any], path: Path) -> Wanted:
        from peft import get_peft_model

        model = get_peft_model(copy.deepcopy(parts["unet"]), make_config(list(layers().values())))
        randomised(model, seed=1)
        model.save_pretrained(str(path.parent))
        return {"unet": model.merge_and_unload().state_dict()}

    return write


def lora_config(**settings: Any) -> Callable[[list[str]], Any]:
    def make(names: list[str]) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=2, lora_alpha=3, target_modules=names, **settings)

    return make


def hadamard_config(names: list[str]) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(r=2, alpha=3, target_modules=names, use_effective_conv2d=True)


def kronecker_config(names: list[str]) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(r=2, alpha=3, target_modules=names)


def by_diffusers(spell: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> Writer:
    """save_lora_weights of peft's state dicts, with the settings in the metadata; or a file respelled by `spell`."""

    def write(parts: dict[str, Any], path: Path) -> Wanted:
        from diffusers import StableDiffusionXLPipeline
        from peft import LoraConfig, get_peft_model
        from peft.utils import get_peft_model_state_dict

        wanted, states, settings = {}, {}, {}
        for seed, part in enumerate(PARTS):
            names = list(sai_layers().values()) if part == "unet" else [n.split(".")[-1] for n in text_layers(part)]
            config = LoraConfig(r=2, lora_alpha=2 if spell else 3 + seed, target_modules=sorted(set(names)))
            model = get_peft_model(copy.deepcopy(parts[part]), config)
            randomised(model, seed)
            named = get_peft_model_state_dict(model)
            states[part] = {key.removeprefix("base_model.model."): tensor for key, tensor in named.items()}
            settings[part] = {**json.loads(json.dumps(config.to_dict(), default=sorted))}
            wanted[part] = model.merge_and_unload().state_dict()
        if spell:
            save_file(spell({f"{part}.{key}": t for part, state in states.items() for key, t in state.items()}), path)
        else:
            StableDiffusionXLPipeline.save_lora_weights(
                path.parent,
                states["unet"],
                states["text_encoder"],
                states["text_encoder_2"],
                weight_name=path.name,
                **{f"{part}_lora_adapter_metadata": values for part, values in settings.items()},
            )
        return wanted

    return write


def to_kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    return convert_state_dict_to_kohya(state)


# ------------------------------------------------------------------ by LyCORIS


def by_lycoris(**settings: Any) -> Writer:
    """create_lycoris on the whole UNet, as SimpleTuner calls it.

    The effect of a LoHa or LoKr is that of its forward pass: LyCORIS' merging of these scales by alpha / rank twice.
    """

    def write(parts: dict[str, Any], path: Path) -> Wanted:
        from lycoris import LycorisNetwork, create_lycoris

        unet = copy.deepcopy(parts["unet"])
        LycorisNetwork.apply_preset({"target_module": ["UNet2DConditionModel"], "enable_conv": True})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=3, conv_dim=2, conv_alpha=3, **settings)
            network.apply_to()
            for module in network.loras:
                for parameter in module.parameters():
                    parameter.data.add_(torch.randn(parameter.shape) * 0.1)
        save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
        network.restore()
        if settings["algo"] in ("loha", "lokr"):
            for module in network.loras:
                module.org_module[0].weight.data += module.get_weight(module.shape) * module.scalar
        else:
            network.merge_to(1.0)
        return {"unet": unet.state_dict()}

    return write


# ------------------------------------------------------------------ the corpus

# fmt: off
CORPUS: dict[str, tuple[Writer, int]] = {  # the writer, and how many weights and biases change
    "kohya": (by_hand(lambda sai, _: f"lora_unet_{sai}", kohya_text), 794 + 264),
    "kohya over diffusers' names": (by_hand(lambda _, path: f"lora_unet_{flat(path)}", kohya_text), 794 + 264),
    "kohya, written by diffusers": (by_diffusers(to_kohya), 794 + 264),
    "kohya, DoRA": (kohya_dora, 722),
    "kohya, norms and biases": (kohya_whole(("diff", "diff_b")), 2 * 256 + 44),
    "LyCORIS' norms and biases": (kohya_whole(("w_norm", "b_norm")), 2 * 256 + 44),
    "diffusers": (by_diffusers(), 794 + 264),
    "diffusers of 2024": (
        by_hand(lambda _, path: f"unet.{path}", diffusers_text, DIFFUSERS_2024, DIFFUSERS_TEXT, None), 794 + 264,
    ),
    "diffusers of 2023": (
        by_hand(processor, diffusers_text, DIFFUSERS_2023, DIFFUSERS_TEXT, None, attention_layers), 560 + 264,
    ),
    "peft": (by_peft(lora_config()), 794),
    "peft, rank-stabilised": (by_peft(lora_config(use_rslora=True)), 794),
    "peft, biases": (by_peft(lora_config(lora_bias=True), resnet_layers), 2 * 66),
    "peft, DoRA": (by_peft(lora_config(use_dora=True)), 794),
    "peft, LoHa": (by_peft(hadamard_config), 794),
    "peft, LoKr": (by_peft(kronecker_config), 794),
    "LyCORIS": (by_lycoris(algo="lora"), 794),
    "LyCORIS, factored kernels": (by_lycoris(algo="lora", use_tucker=True), 794),
    "LyCORIS, LoHa": (by_lycoris(algo="loha", use_tucker=True), 794),
    "LyCORIS, LoKr": (by_lycoris(algo="lokr", factor=2, use_tucker=True), 794),
    "LyCORIS, whole": (by_lycoris(algo="full", train_norm=True), 1680),
}
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("dialect", CORPUS)
def test_the_effect_is_the_writers(dialect: str, parts: dict[str, Any], tmp_path: Path) -> None:
    write, count = CORPUS[dialect]
    path = tmp_path / ("adapter_model.safetensors" if dialect.startswith("peft") else "x.safetensors")
    wanted = write(parts, path)
    file = read_lora(path)
    assert file.unknown == ()
    assert sum(map(len, file.parts().values())) == count
    for part, modules in file.parts().items():
        ours = copy.deepcopy(parts[part])
        report = merge_into(ours, modules, 1.0)
        assert not report.missing
        if part in wanted:
            assert worst_error(ours, wanted[part]) <= TOLERANCE
            assert worst_error(parts[part], wanted[part]) > 1e-3
