"""Learns the small CLIP vocabulary: python tools/world/make_tokenizer.py --work DIR. Byte-level BPE, as CLIP's own."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import world

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 520
PROMPT_WORDS = [
    *("the", "of", "and", "with", "in", "on", "a", "an", "one", "two", "big", "small", "bright", "dark", "nice"),
    *("simple", "flat", "soft", "clean", "poster", "photo", "picture", "painting", "sketch", "style", "icon", "logo"),
    *("art", "best", "quality", "high", "low", "blurry", "ugly", "bad", "sharp", "detailed", "pixel", "retro", "game"),
    *("colour", "color", "shape", "background"),
]


def byte_letters() -> list[str]:
    """The printable letter for each of the 256 bytes, in CLIP's order: '!' is number 0."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def captions() -> list[str]:
    """One caption of every phrasing and style for every kind, and the usual words of prompts."""
    scenes = [world.Scene(*kind) for kind in world.ALL_KINDS]
    plain = [world.caption(scene, phrase=i) for scene in scenes for i in range(len(world.PLAIN_PHRASES))]
    styled = [world.caption(scene, style) for scene in scenes for style in world.STYLE_WORDS]
    return plain + styled + PROMPT_WORDS


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The most frequent neighbours first; ties in alphabetical order, so that the result is always the same."""
    words = Counter(word for text in texts for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()))
    split = {(*word[:-1], word[-1] + "</w>"): number for word, number in words.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, number in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        split = {_merged(parts, best): number for parts, number in split.items()}
        merges.append(best)
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair and not out[-1].endswith("</w>"):
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def write_tokenizer(folder: Path, merges: list[tuple[str, str]], pad: str) -> None:
    """The files that transformers' CLIPTokenizer reads. SDXL pads its first tokenizer with END, its second with '!'."""
    letters = byte_letters()
    names = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {name: number for number, name in enumerate(names)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "add_prefix_space": False}
    _write_json(folder / "tokenizer_config.json", settings | special)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def make(work: Path) -> None:
    merges = learn_merges(captions(), MERGES)
    write_tokenizer(work / "tokenizer", merges, END)
    write_tokenizer(work / "tokenizer_2", merges, "!")
    print(f"{len(merges)} merges, {512 + len(merges) + 2} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    make(parser.parse_args().work)
