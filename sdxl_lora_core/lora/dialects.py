"""The key formats of LoRA files: parses a key into its part, its module and the role of the tensor.

| writer                       | key                                                                        |
|------------------------------|----------------------------------------------------------------------------|
| kohya                        | lora_unet_input_blocks_4_1_..._attn1_to_q.lora_down.weight, .alpha         |
| kohya over diffusers' names  | lora_unet_down_blocks_1_attentions_0_..._attn1_to_q.lora_down.weight       |
| diffusers with peft          | unet.down_blocks.1.attentions.0...attn1.to_q.lora_A.weight                 |
| peft alone                   | base_model.model.down_blocks.1.attentions.0...attn1.to_q.lora_A.weight     |
| diffusers of 2023            | unet.down_blocks...attn1.processor.to_q_lora.down.weight, .lora.down.weight |
| ComfyUI                      | diffusion_model.input_blocks.4.1...attn1.to_q.lora_down.weight             |
| LyCORIS                      | lora_unet_input_blocks_4_1_..._attn1_to_q.hada_w1_a, .lokr_w1, .alpha      |
| full diffs, norms, biases    | lora_unet_..._norm1.diff and .diff_b, or LyCORIS' .w_norm and .b_norm      |
| peft with lora_bias          | unet....to_out.0.lora_B.bias                                               |
| OneTrainer, of new tokens    | bundle_emb.NAME.clip_l, bundle_emb.NAME.clip_g                             |

The text encoders are lora_te1_/lora_te2_, text_encoder./text_encoder_2. or text_encoders.clip_l./clip_g.transformer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..messages import shown
from ..sdxl.family import Part
from ..sdxl.unet_names import diffusers_block_name, dotted

# down, mid, up, up_bias, alpha, dora_scale, magnitude, diff (of the weight), diff_b (of the bias), or LyCORIS' name of
# a factor: hada_w1_a, lokr_w2 and so on
Role = str
SETTINGS_KEY = "lora_adapter_metadata"  # where diffusers stores peft's settings, as JSON

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"(?:\.|_)lora(?:_linear_layer)?[._]down(?:\.weight)?$"), "down"),
    (re.compile(r"(?:\.|_)lora(?:_linear_layer)?[._]up(?:\.weight)?$"), "up"),
    (re.compile(r"\.lora_mid\.weight$"), "mid"),
    (re.compile(r"\.lora_(?:B|up)(?:\..+?)?\.bias$"), "up_bias"),
    (re.compile(r"\.lora_A(?:\.(?!weight$).+?)?(?:\.weight)?$"), "down"),
    (re.compile(r"\.lora_B(?:\.(?!weight$).+?)?(?:\.weight)?$"), "up"),
    (re.compile(r"\.(?:diff|w_norm)$"), "diff"),
    (re.compile(r"\.(?:diff_b|b_norm)$"), "diff_b"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.dora_scale$"), "dora_scale"),
    (re.compile(r"\.lora_magnitude_vector(?:\..+)?$"), "magnitude"),
)
_LYCORIS_FACTOR = re.compile(r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$")
_PARTS: tuple[tuple[str, Part, bool], ...] = (  # the prefix, its part, whether underscores replace the dots
    ("lora_unet_", "unet", True),
    ("lycoris_", "unet", True),
    ("lora_te1_", "text_encoder", True),
    ("lora_te2_", "text_encoder_2", True),
    ("text_encoders.clip_l.transformer.", "text_encoder", False),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", False),
    ("text_encoder_2.", "text_encoder_2", False),
    ("text_encoder.", "text_encoder", False),
    ("unet.", "unet", False),
    ("model.diffusion_model.", "unet", False),
    ("diffusion_model.", "unet", False),
)
_PEFT_WRAPPER = "base_model.model."
_WRAPPERS = re.compile(r"(^|(?<=[._]))(_orig_mod|module)[._]")  # of torch.compile and DataParallel, at any depth
_DIFFUSERS_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out|time_embedding|add_embedding)(\.|$)"
)
_TEXT_MODULE = re.compile(r"text_model\.|text_projection$")
_BARE_TEXT_MODULE = re.compile(r"(encoder|embeddings|final_layer_norm)(\.|$)")


class Place(NamedTuple):
    """The module that a tensor belongs to: its part and diffusers' path."""

    part: Part
    module: str


def role_of(key: str) -> tuple[str, Role] | None:
    """The key without its ending, and the role that the ending gives the tensor; None for an unknown ending."""
    if found := _LYCORIS_FACTOR.search(key):
        return key[: found.start()], found[1]
    for pattern, role in _ROLES:
        if found := pattern.search(key):
            return key[: found.start()], role
    return None


def place_of(key: str) -> Place | None:
    """The module of a key without its ending, in any of the formats above; None for an unknown one."""
    name = _WRAPPERS.sub("", key).removeprefix(_PEFT_WRAPPER)
    part, flat = "unet", False
    for prefix, named, is_flat in _PARTS:
        if name.startswith(prefix):
            name, part, flat = name.removeprefix(prefix).removeprefix(_PEFT_WRAPPER), named, is_flat
            break
    path = dotted(name) if flat else name
    module = _unet_module(path) if part == "unet" else _text_module(path)
    return None if module is None else Place(part, module)


def peft_alpha(settings: Mapping[str, Any], place: Place, rank: int) -> float:
    """The alpha of a module by peft's settings; by default the rank, for a scale of 1.

    `settings` are those of one adapter, or of several with the part's name before each key, as diffusers writes them.
    """
    own = _of_part(settings, place)
    alpha = own.get("lora_alpha") or own.get("alpha") or rank  # the second is the name in peft's LoHa and LoKr
    alpha = _by_pattern(own.get("alpha_pattern"), place, alpha)
    return _number(place, "alpha", alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0)


def peft_rank(settings: Mapping[str, Any], place: Place) -> int | None:
    """The rank of a module by peft's settings: the tensors of a LoKr may not show it."""
    own = _of_part(settings, place)
    rank = _by_pattern(own.get("rank_pattern"), place, own.get("r"))
    return int(_number(place, "rank", rank)) if rank else None


def _of_part(settings: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    part = f"{place.part}."
    return {key.removeprefix(part): value for key, value in settings.items() if key.startswith(part)} or settings


def _by_pattern(patterns: Any, place: Place, otherwise: Any) -> Any:
    """The value of the first pattern for a module. Malformed patterns and values apply to none."""
    items = patterns.items() if isinstance(patterns, Mapping) else ()
    numbers = (item for item in items if isinstance(item[1], int | float) and math.isfinite(item[1]))
    return next((value for key, value in numbers if _matches(key, place.module)), otherwise)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return False


def peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings in a file's metadata, empty if there are none. Raises ValueError if they are damaged."""
    try:
        settings = json.loads(metadata.get(SETTINGS_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"the file's metadata {SETTINGS_KEY} is not JSON ({error}): save it again") from error
    return settings if isinstance(settings, dict) else {}


def _number(place: Place, name: str, value: Any) -> float:
    """A rank or an alpha. Raises ValueError if it is not a number: it scales the LoRA."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{place.part}.{place.module} has {name} {shown(value)} in the LoRA's settings, which is not a number: "
            "save the LoRA again"
        )
    return number


def _unet_module(path: str) -> str | None:
    path = path.replace(".processor.", ".")
    if path.endswith(".to_out"):
        path += ".0"
    return path if _DIFFUSERS_UNET.match(path) else diffusers_block_name(path)


def _text_module(path: str) -> str | None:
    if _BARE_TEXT_MODULE.match(path):  # transformers from 5.6 on has no text_model prefix
        path = f"text_model.{path}"
    return path if _TEXT_MODULE.match(path) else None
