"""Opens a base model, SDXL or Stable Diffusion 1.5, and loads its parts.

Opening reads headers and settings and hashes files, but loads no weights. Other models are rejected by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from ..files import file_sha256, json_sha256
from ..safetensors_file import read_header
from . import loading
from .detection import Detector, Prediction, PredictionType, has_vae, read_json, transformer_blocks
from .family import CONFIGS, SD15, SDXL, Family, Part
from .file_kinds import require_unscaled
from .precision import PRECISIONS, Precision

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

NO_VAE = ""  # in place of its hash
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PredictionOverride = Literal["auto", "epsilon", "v_prediction"]
Override = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class SDXLBase:
    """A base model without its weights. `part_hashes` are (part, SHA-256) for its parts and tokenizers.

    `fingerprint` depends on content only: not on the path, the precision or an overridden prediction type. `configs`
    is the folder with each part's settings: the model's own, or CONFIGS for a single file. `vae` replaces the base's
    own VAE (see vae_override). A checkpoint may lack one: the hash of the VAE is then NO_VAE (see require_vae).
    `family` is SDXL, or SD15 for a base to generate with only (see require_sdxl).
    """

    path: Path
    layout: Literal["single_file", "diffusers"]
    name: str
    precision: Precision
    prediction_type: PredictionType
    zero_terminal_snr: bool
    fingerprint: str
    part_hashes: tuple[tuple[str, str], ...]
    configs: Path
    vae: Path | None = None
    family: Family = SDXL


def open_base(
    path: Path,
    precision: Precision = "auto",
    hash_memo: Path | None = None,
    *,
    prediction: PredictionOverride = "auto",
    zero_terminal_snr: Override = "auto",
    configs: Path = CONFIGS,
) -> SDXLBase:
    """Checks and hashes an SDXL base. `hash_memo` is a folder that stores hashes of large files (see file_sha256).

    `prediction` and `zero_terminal_snr` override what the file states (see `predicting`). `configs` has the settings
    for single files; a diffusers folder has its own.
    Raises FileNotFoundError if `path` does not exist, ValueError if it is not SDXL, naming what it is.
    """
    base = _opened(path, precision, hash_memo, Detector(SDXL, prediction), configs)
    return predicting(base, prediction, zero_terminal_snr)


def open_sd15_base(
    path: Path,
    precision: Precision = "auto",
    hash_memo: Path | None = None,
    *,
    prediction: PredictionOverride = "auto",
    zero_terminal_snr: Override = "auto",
    configs: Path = SD15.configs,
) -> SDXLBase:
    """As open_base, for a Stable Diffusion 1.5 base. Images can be generated with it, as a comparison for SDXL."""
    base = _opened(path, precision, hash_memo, Detector(SD15, prediction), configs)
    return predicting(base, prediction, zero_terminal_snr)


def _opened(path: Path, precision: Precision, hash_memo: Path | None, detector: Detector, configs: Path) -> SDXLBase:
    parts = detector.family.parts
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if path.is_dir():
        found = detector.of_folder(path)
        hashes = {str(part): _folder_part_hash(path / part, part, hash_memo) for part in parts}
        return _handle(path, path, precision, (detector.family, found), hashes)
    if not path.exists():
        raise FileNotFoundError(f"base model {path.name} does not exist: {detector.family.wanted}")
    header = read_header(path)
    found = detector.of_checkpoint(header, configs)
    hashes = dict.fromkeys(map(str, parts), file_sha256(path, hash_memo))
    hashes |= {} if has_vae(header) else {"vae": NO_VAE}
    return _handle(path, configs, precision, (detector.family, found), hashes)


def predicting(base: SDXLBase, prediction: PredictionOverride, zero_terminal_snr: Override) -> SDXLBase:
    """The base with another prediction type or noise schedule than its file states; auto keeps the file's.

    Raises ValueError for any other value.
    """
    if prediction not in get_args(PredictionOverride):
        raise ValueError(f"prediction is {prediction!r}: choose one of {', '.join(get_args(PredictionOverride))}")
    if zero_terminal_snr not in get_args(Override):
        raise ValueError(f"zero_terminal_snr is {zero_terminal_snr!r}: choose one of {', '.join(get_args(Override))}")
    return replace(
        base,
        prediction_type=base.prediction_type if prediction == "auto" else prediction,
        zero_terminal_snr=base.zero_terminal_snr if zero_terminal_snr == "auto" else zero_terminal_snr == "on",
    )


def require_vae(base: SDXLBase) -> None:
    """Raises ValueError for a checkpoint without a VAE, or with half of one, if no other was chosen (see with_vae)."""
    if dict(base.part_hashes)["vae"] == NO_VAE:
        raise ValueError(
            f"{base.name} is {base.family.checkpoint} without its VAE, or with half of one: choose one as vae, such "
            f"as {base.family.title}'s own, or use another checkpoint"
        )


def require_sdxl(base: SDXLBase, purpose: str) -> None:
    """Raises ValueError for a base of another family, with which images can be generated and nothing else be done.

    `purpose` begins the reason: "training" or "LoRA my_lora".
    """
    if not base.family.is_sdxl:
        raise ValueError(
            f"{purpose} needs an SDXL base, and {base.name} is a {base.family.title} base, which is for generating "
            "images to compare with: connect Load SDXL Base"
        )


def require_predictable(base: SDXLBase, other_remedy: str = "") -> None:
    """Raises ValueError for epsilon prediction with zero terminal SNR (Lin et al., arXiv 2305.08891, section 3.1).

    At the last timestep the input is pure noise, so that epsilon carries no information about the image.
    """
    if base.prediction_type == "epsilon" and base.zero_terminal_snr:
        raise ValueError(
            f"{base.name} would predict epsilon with zero terminal SNR, where the first input is pure noise: set "
            f"prediction to v_prediction if the base was trained so, else zero_terminal_snr to off{other_remedy}"
        )


def require_single_file_size(base: SDXLBase) -> None:
    """Raises ValueError if a single file of this base could not be opened, because it is not of SDXL's size."""
    own, published = (read_json(configs / "unet" / "config.json") for configs in (base.configs, CONFIGS))
    sizes = [(unet["cross_attention_dim"], transformer_blocks(unet)) for unet in (own, published)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"layout is single_file, but {base.name} has {sizes[0][1]} transformer blocks and text of width "
            f"{sizes[0][0]} where SDXL has {sizes[1][1]} and {sizes[1][0]}, and a single file does not describe that: "
            "set layout to diffusers"
        )


def prediction_arguments(base: SDXLBase) -> dict[str, Any]:
    """The arguments of `predicting` that reproduce this base's prediction type and schedule."""
    return {"prediction": base.prediction_type, "zero_terminal_snr": "on" if base.zero_terminal_snr else "off"}


def load_tokenizers(base: SDXLBase) -> tuple[CLIPTokenizer, ...]:
    """CLIP's tokenizer for each text encoder; SDXL's pad with the end token and with "!". Reads local files only."""
    from transformers import CLIPTokenizer

    folders = [_tokenizer_folder(base.configs, name) for name in base.family.tokenizers]
    return tuple(CLIPTokenizer.from_pretrained(str(folder), local_files_only=True) for folder in folders)


def load_part(base: SDXLBase, part: Part, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """One part in eval mode without gradients. Reads only that part's tensors and never the network.

    Raises ValueError if tensors are missing, unknown or of the wrong shape.
    """
    if part == "vae":
        require_vae(base)
    if part not in base.family.parts:
        raise ValueError(f"part is {part!r}: choose one of {', '.join(base.family.parts)}")
    if part == "vae" and base.vae:
        module = loading.vae_alone(base.vae, base.configs, dtype)
    elif base.layout == "diffusers":
        module = loading.from_folder(base.path / part, part, dtype)
    else:
        module = loading.from_single_file(base.path, base.configs, part, dtype, base.family.prefix(part))
    return module.to(device).eval().requires_grad_(False)


def empty_part(base: SDXLBase, part: Part, dtype: torch.dtype) -> nn.Module:
    """load_part without weights: on fake CPU tensors under FakeTensorMode. Reads the settings only."""
    return loading.without_contents(base.configs / part, part, dtype).eval().requires_grad_(False)


def scheduler_config(base: SDXLBase) -> dict[str, Any]:
    """The noise schedule as diffusers' schedulers take it: betas, steps, prediction type, zero terminal SNR."""
    settings = {name: value for name, value in _schedule(base.configs).items() if not name.startswith("_")}
    settings["prediction_type"] = base.prediction_type
    settings["rescale_betas_zero_snr"] = base.zero_terminal_snr
    if base.zero_terminal_snr:
        settings["timestep_spacing"] = "trailing"  # samples the step of zero SNR: Lin et al., arXiv 2305.08891
    return settings


def native_side(base: SDXLBase) -> int:
    """The side in pixels of the square images that the base was trained for: 1024 for SDXL itself, 512 for SD 1.5."""
    side = read_json(base.configs / "unet" / "config.json").get("sample_size")
    return 8 * side if isinstance(side, int) and side > 0 else 1024  # 8 pixels to a latent


def size_note(base: SDXLBase, side: int, option: str) -> str:
    """What to say of images that are too large: a longer side over twice the native one, and over 1.5 times for SD 1.5,
    which then repeats the subject. Empty for all others."""
    native = native_side(base)
    if side <= (2 if base.family.is_sdxl else 1.5) * native:
        return ""
    return (
        f"{base.name} is for images of {native} x {native} pixels: {side} takes long and will not look right. "
        f"Set {option} to {native}."
    )


def describe_base(base: SDXLBase) -> str:
    """Three lines of text: name and size, prediction type, precision and native resolution, fingerprint."""
    single = base.layout == "single_file"
    folders = [] if single else [base.path / part for part in base.family.parts]
    files = [base.path] if single else [file for folder in folders for file in loading.find_weights(folder)[1]]
    size = sum(file.stat().st_size for file in files)
    layout = "single-file checkpoint" if single else "diffusers folder"
    snr = ", zero terminal SNR" if base.zero_terminal_snr else ""
    vae = f"; VAE {base.vae.name}" if base.vae else ""
    native = native_side(base)
    return (
        f"{base.name}: {base.family.title}, {layout}, {size / 1e9:.2f} GB of weights{vae}\n"
        f"{base.prediction_type} prediction{snr}; precision {base.precision}; {native} x {native} pixels\n"
        f"fingerprint {base.fingerprint}"
    )


def _handle(
    path: Path, configs: Path, precision: Precision, found: tuple[Family, Prediction], hashes: dict[str, str]
) -> SDXLBase:
    family, prediction = found
    hashes = hashes | {name: _tokenizer_hash(_tokenizer_folder(configs, name)) for name in family.tokenizers}
    return SDXLBase(
        path=path,
        layout="diffusers" if path == configs else "single_file",
        name=path.name.removesuffix(".safetensors"),
        precision=precision,
        prediction_type=prediction.type,
        zero_terminal_snr=prediction.zero_terminal_snr,
        fingerprint=json_sha256([hashes, prediction, _schedule(configs)]),
        part_hashes=tuple(sorted(hashes.items())),
        configs=configs,
        family=family,
    )


def _tokenizer_folder(configs: Path, name: str) -> Path:
    """The settings of SD 1.5's single files have none of their own: it is SDXL's first."""
    return (CONFIGS if configs == SD15.configs else configs) / name


def weights_sha256(path: Path, part: str, memo: Path | None) -> str:
    """The hash of a single file, or of the settings and weights in a diffusers folder as those of `part`."""
    return _folder_part_hash(path, part, memo) if path.is_dir() else file_sha256(path, memo)


def _folder_part_hash(folder: Path, part: str, memo: Path | None) -> str:
    """The hash of a part's settings and weights. Checks that every weight file is complete."""
    _, files = loading.find_weights(folder)
    for file in files:
        require_unscaled(read_header(file))
    settings = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
    return json_sha256([part, settings, [file_sha256(file, memo) for file in files]])


def _tokenizer_hash(folder: Path) -> str:
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder.name}/ contains no tokenizer: the model folder is incomplete, download it again"
        )
    return json_sha256([[file.name, file_sha256(file)] for file in files])


def _schedule(configs: Path) -> dict[str, Any]:
    return read_json(configs / "scheduler" / "scheduler_config.json")
