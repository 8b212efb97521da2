"""Loads one part of SDXL from a diffusers folder or a single-file checkpoint, without network access."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..messages import brief
from ..runtime.device import is_out_of_memory
from ..runtime.library_logs import quiet_libraries
from ..safetensors_file import read_header, save_tensors
from .detection import PART_CLASSES, read_json
from .family import SDXL, Part

Assembled = tuple[nn.Module, list[str]]

# Entries of published files that are not needed: a buffer that older transformers saved, and CLIP's temperature.
_HARMLESS = ("position_ids", "logit_scale")
_TEXT_MODEL, _BARE = "text_model.", "embeddings|encoder|final_layer_norm"
# Of parts in a checkpoint: what a VAE's training left behind, and a projection that the first encoder does not use.
_LEFT_BEHIND = re.compile(r"^first_stage_model\.(model_ema|loss)\.|\.transformer\.text_projection\.weight$")
# Names of a VAE's attention: those of diffusers before 0.17, and of checkpoints that were converted half-way.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_HALF_WAY = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ALIGNMENT = 64  # bytes, as of torch's own allocations
_TENSORS_AT_ONCE = 64


def find_weights(folder: Path) -> tuple[str | None, list[Path]]:
    """The variant (None, "fp16" or "bf16") and the weight files in a part's folder: one, or the shards in its index.

    The full-precision file is preferred to a variant. Raises FileNotFoundError if there are no safetensors.
    """
    for variant, infix in ((None, ""), ("fp16", ".fp16"), ("bf16", ".bf16")):
        for stem in ("diffusion_pytorch_model", "model"):
            file = folder / f"{stem}{infix}.safetensors"
            index = folder / f"{stem}.safetensors.index{infix}.json"
            if file.is_file():
                return variant, [file]
            if index.is_file():
                shards = sorted(set(read_json(index)["weight_map"].values()))
                return variant, [folder / Path(shard).name for shard in shards]
    pickles = [file.name for file in folder.glob("*.bin")]
    found = f"only {pickles[0]}, which is a pickle and is not opened" if pickles else "no weights"
    raise FileNotFoundError(f"{folder.name}/ contains {found}: download the .safetensors files of the model")


def weight_files(path: Path) -> list[Path]:
    """The weight files of a diffusers folder, or the single file itself."""
    return find_weights(path)[1] if path.is_dir() else [path]


def from_folder(folder: Path, part: Part, dtype: torch.dtype) -> nn.Module:
    """Loads a part from its folder. Raises ValueError if the files do not have exactly the part's tensors."""
    where = f"{folder.parent.name}/{folder.name}"
    try:
        with quiet_libraries():
            module, wrong = (_unet if part == "unet" else _small_part)(folder, part, dtype)
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # of any type: each library checks its settings in its own way, or not at all
        if isinstance(error.__cause__, ImportError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            raise
        cause = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"the {part} in {where} cannot be loaded ({cause}): download the model again") from error
    require_complete(wrong, part, where)
    return align(module)


def _unet(folder: Path, part: Part, dtype: torch.dtype) -> Assembled:
    """The UNet, and the names of tensors that are missing, unknown or of another shape."""
    tensors: dict[str, Tensor] = {}
    for file in find_weights(folder)[1]:
        tensors |= read_tensors(file, "", dtype)
    return assembled(_part_class(part), read_json(folder / "config.json"), tensors)


def assembled(module_class: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Assembled:
    """A diffusers model that uses the given tensors without copying, and the names of tensors that do not fit it.

    diffusers' from_pretrained keeps the whole file in memory beside the weights: the peak of a training run.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        module: nn.Module = module_class.from_config(dict(settings))
    wanted = {name: weight.shape for name, weight in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted({name for name, _ in wanted.items() ^ found.items()})
    if not wrong:
        module.load_state_dict(tensors, assign=True)
    return module, wrong


def without_contents(folder: Path, part: Part, dtype: torch.dtype) -> nn.Module:
    """A part as its settings describe it, whose tensors are torch.empty's: under FakeTensorMode they take no memory."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("meta"), quiet_libraries():
        part_class = _part_class(part)
        if part in ("unet", "vae"):
            module = part_class.from_config(read_json(folder / "config.json"))
        else:
            module = part_class(part_class.config_class.from_pretrained(str(folder), local_files_only=True))
    for inner in module.modules():
        for own in (inner._parameters, inner._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=kind)
                    own[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return module


def _small_part(folder: Path, part: Part, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Loads the VAE or a text encoder with from_pretrained, which converts the tensor names of older versions."""
    variant, _ = find_weights(folder)
    module, info = _part_class(part).from_pretrained(
        str(folder),
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **({"torch_dtype": dtype} if part == "vae" else {"dtype": dtype, **_older_names(folder)}),
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    return module, [str(name) for name in wrong if not str(name).endswith(_HARMLESS)]


def _older_names(folder: Path) -> dict[str, Any]:
    """Arguments for transformers before 5.6 to read an encoder that a later version saved, without text_model."""
    release = tuple(int(number) for number in version("transformers").split(".")[:2])
    bare = any(read_header(file).has("encoder.") for file in find_weights(folder)[1])
    return {"key_mapping": {f"^({_BARE})": rf"{_TEXT_MODEL}\1"}} if bare and release < (5, 6) else {}


def save_encoder(module: Any, folder: Path) -> None:
    """Saves an encoder in diffusers' layout, with the tensor names that every version of transformers reads."""
    module.save_pretrained(folder, safe_serialization=True)
    for file in find_weights(folder)[1]:
        tensors = read_tensors(file, "", module.dtype)
        renamed = {re.sub(f"^({_BARE})", rf"{_TEXT_MODEL}\1", name): tensor for name, tensor in tensors.items()}
        save_tensors(file, renamed, {"format": "pt"})  # required by transformers


def from_single_file(file: Path, configs: Path, part: Part, dtype: torch.dtype, prefix: str) -> nn.Module:
    """Reads only the part's tensors and renames them as diffusers does. Raises ValueError if any is missing.

    `prefix` is that of the tensors' names, empty in a file of this part only, which may have names of both kinds.
    """
    tensors = _with_todays_names(read_tensors(file, prefix, dtype), part, prefix)
    require_complete([] if tensors else [prefix], part, file.name)
    try:
        with quiet_libraries():
            module = _convert(tensors, configs, part, dtype)
    except (ValueError, KeyError, RuntimeError) as error:
        if isinstance(error.__cause__, ImportError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            raise
        cause = brief(error)
        raise ValueError(f"the {part} in {file.name} does not fit ({cause}): download the checkpoint again") from error
    require_complete([name for name, tensor in module.state_dict().items() if tensor.is_meta], part, file.name)
    if prefix:
        require_complete(_unknown(tensors, module, part, prefix), part, file.name)
    return align(module)


def _with_todays_names(tensors: Mapping[str, Tensor], part: Part, prefix: str) -> dict[str, Tensor]:
    """The tensors of a part without what is not needed, and with the names that diffusers' conversion knows."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part == "text_encoder":
            name = re.sub(f"^{re.escape(prefix)}({_BARE})\\.", rf"{prefix}{_TEXT_MODEL}\1.", name)  # noqa: PLW2901
        elif part == "vae":
            for older, newer in (*_ATTENTION.items(), *_HALF_WAY.items()):
                where = r"attentions\.\d+" if older in _ATTENTION else r"mid\.attn_\d+"
                name = re.sub(rf"({where})\.{re.escape(older)}\.", rf"\1.{newer}.", name)  # noqa: PLW2901
        if not _LEFT_BEHIND.search(name):
            renamed[name] = tensor
    return renamed


def _unknown(tensors: Iterable[str], module: nn.Module, part: Part, prefix: str) -> list[str]:
    """The names of tensors that the part does not have, which diffusers' conversion ignores."""
    from .checkpoint_names import published_names  # which imports this module

    shapes = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    known = {prefix + name.removeprefix(SDXL.prefix(part)) for name in published_names(part, shapes)}
    return [name for name in tensors if name not in known and not name.endswith(_HARMLESS)]


def vae_alone(path: Path, configs: Path, dtype: torch.dtype) -> nn.Module:
    """A VAE from a diffusers folder, or from a file with a VAE only, in diffusers' names or the published ones.

    Raises ValueError if its tensors are not those of the VAE in `configs`.
    """
    return (
        from_folder(path, "vae", dtype) if path.is_dir() else from_single_file(path, configs, "vae", dtype, prefix="")
    )


def _convert(tensors: Mapping[str, Tensor], configs: Path, part: Part, dtype: torch.dtype) -> nn.Module:
    part_class = _part_class(part)
    if part in ("unet", "vae"):
        return part_class.from_single_file(
            tensors, config=str(configs), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    return create_diffusers_clip_model_from_ldm(
        part_class, tensors, subfolder=part, config=str(configs), torch_dtype=dtype, local_files_only=True
    )


def read_tensors(file: Path, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies the tensors whose names start with `prefix`; floating-point ones are converted to `dtype`.

    Pages read from an open file count as memory of the process until it is closed, so it is reopened every few tensors.
    """
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
    tensors: dict[str, Tensor] = {}
    for start in range(0, len(names), _TENSORS_AT_ONCE):
        with safe_open(file, framework="pt") as weights:
            for name in names[start : start + _TENSORS_AT_ONCE]:
                mapped = weights.get_tensor(name)
                tensors[name] = mapped.to(dtype if mapped.is_floating_point() else mapped.dtype, copy=True)
    return tensors


def align(module: nn.Module) -> nn.Module:
    """Copies weights that are not aligned, because they are views of a mapped file or of another tensor.

    On the CPU the last bit of a result depends on alignment; equal weights must give equal results from any file.
    """
    for parameter in module.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return module


def _part_class(part: Part) -> Any:
    import diffusers
    import transformers

    return getattr(diffusers if part in ("unet", "vae") else transformers, PART_CLASSES[part])


def require_complete(wrong: list[str], part: str, where: str) -> None:
    """Raises ValueError if there are names of wrong tensors."""
    if wrong:
        shown = ", ".join(sorted(wrong)[:3])
        raise ValueError(
            f"the {part} in {where} does not fit: {len(wrong)} tensors are missing, unknown or of another shape"
            f" ({shown}); download the model again"
        )
