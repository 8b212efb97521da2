"""Groups the tensors of a LoRA file by module and builds adapters of them. dialects.py parses the keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..sdxl.family import ENCODERS, Part
from ..text.embedding_files import Vectors, bundled_token
from .dialects import Place, Role, peft_alpha, peft_rank, place_of, role_of
from .modules import LOHA_FACTORS, AdapterModule, DiffModule, LoHaModule, LoKrModule, LoRAFile, LoRAModule

_Roles = dict[Role, Tensor]


def lora_of_tensors(name: str, tensors: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> LoRAFile:
    """The adapters of named tensors. `settings` are peft's, empty if there are none; `name` is for messages.

    Raises ValueError for damaged tensors: factors whose shapes do not match, and values that are not finite.
    """
    file = LoRAFile()
    groups: dict[Place, _Roles] = {}
    tokens: dict[str, dict[Part, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors:
        file.found += 1
        stem, role = role_of(key) or ("", None)
        place = place_of(stem)
        if token := bundled_token(key):
            tokens.setdefault(token.name, {})[token.part] = tensor
        elif role is None or place is None:
            unknown.append(key)
        else:
            groups.setdefault(place, {})[role] = tensor
    for place, roles in groups.items():
        changes, left = _changes(name, place, roles, settings)
        file.parts()[place.part].update(changes)
        unknown += [f"{place.part}.{place.module} ({role} alone)" for role in left]
    file.tokens, file.unknown = _tokens(name, tokens), tuple(sorted(unknown))
    return file


def _tokens(file: str, tokens: Mapping[str, dict[Part, Tensor]]) -> dict[str, Vectors]:
    for name, vectors in tokens.items():
        if set(vectors) != set(ENCODERS) or len({len(rows) for rows in vectors.values()}) > 1:
            raise ValueError(f"{file}: the new token {name} lacks vectors for one of the text encoders: damaged file")
    return dict(tokens)


def _changes(
    file: str, place: Place, roles: _Roles, settings: Mapping[str, Any]
) -> tuple[dict[str, AdapterModule], list[Role]]:
    """The changes of a module's weight and bias, by path, and the roles of tensors that are not part of a change."""
    where = f"{file}: {place.part}.{place.module}"
    if not all(tensor.float().isfinite().all() for tensor in roles.values()):
        raise ValueError(f"{where} contains NaN or infinity: its training diverged, use an earlier checkpoint")
    if wrong := [role for role in roles if not roles[role].numel() or (role == "alpha" and roles[role].numel() > 1)]:
        raise ValueError(f"{where} has {wrong[0]} of shape {list(roles[wrong[0]].shape)}: damaged file")
    changes: dict[str, AdapterModule] = {}
    bias, left = f"{place.module}.bias", set(roles)
    if _is_factored(roles):
        changes[place.module] = module = _factored(where, place, roles, settings)
        left &= {"diff", "diff_b"}
        if "up_bias" in roles:
            changes[bias] = DiffModule(roles["up_bias"], module.scale)
    elif "diff" in roles:
        changes[place.module] = DiffModule(roles["diff"])
        left -= {"diff", "alpha"}
    if "diff_b" in roles:
        changes[bias] = DiffModule(roles["diff_b"])
        left -= {"diff_b"}
    return changes, sorted(left)


def _is_factored(roles: _Roles) -> bool:
    """Whether all factors of a LoRA, a LoHa or a LoKr are there."""

    def has(*names: str) -> bool:
        return all(name in roles for name in names)

    lokr = all(has(f"lokr_w{i}") or has(f"lokr_w{i}_a", f"lokr_w{i}_b") for i in (1, 2))
    return has("down", "up") or has(*LOHA_FACTORS) or lokr


def _factored(where: str, place: Place, roles: _Roles, settings: Mapping[str, Any]) -> AdapterModule:
    if "down" in roles:
        return _lora_module(where, place, roles, settings)
    factors = {role: tensor for role, tensor in roles.items() if role.startswith(("hada_", "lokr_"))}
    module = (LoHaModule if "hada_w1_a" in factors else LoKrModule)(factors, 1.0, roles.get("dora_scale"))
    try:
        module.change(torch.device("meta"))
    except RuntimeError as error:
        raise ValueError(f"{where} has factors whose shapes do not match ({error}): damaged file") from error
    if "alpha" in roles:
        return replace(module, alpha=float(roles["alpha"]))
    rank = peft_rank(settings, place)
    if not module.rank and rank:  # peft scales a LoKr without factored matrices, too
        scale = peft_alpha(settings, place, rank) / rank
        return replace(module, factors={**factors, "lokr_w1": factors["lokr_w1"].float() * scale})
    return replace(module, alpha=peft_alpha(settings, place, module.rank or 1))


def _lora_module(where: str, place: Place, roles: _Roles, settings: Mapping[str, Any]) -> LoRAModule:
    down, up = roles["down"], roles["up"]
    if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{where} has factors {list(down.shape)} and {list(up.shape)} of different ranks: damaged file"
        )
    if "mid" in roles:  # Tucker decomposition of a convolution: [rank, in] per pixel, then [rank, rank, h, w]
        down = torch.einsum("okhw,ki->oihw", roles["mid"].float(), down.flatten(1).float())
    if down.dim() == 4 and down.shape[2:] == (1, 1) and not place.module.endswith("conv_shortcut"):
        down, up = down.flatten(1), up.flatten(1)  # some trainers write linear layers as 1x1 convolutions
    rank = down.shape[0]
    alpha = float(roles["alpha"]) if "alpha" in roles else peft_alpha(settings, place, rank)
    magnitude = roles.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude.reshape(-1, *[1] * (down.dim() - 1))
    return LoRAModule(down, up, alpha, roles.get("dora_scale"), magnitude)
