"""Writes the CLIP tokenizer files of `sdxl_lora_core/sdxl/configs` from CLIP's published merge list.

python -m pip download --no-deps open_clip_torch
unzip open_clip_torch-*.whl 'open_clip/bpe_simple_vocab_16e6.txt.gz'
python tools/world/make_tokenizer_data.py open_clip/bpe_simple_vocab_16e6.txt.gz
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "sdxl_lora_core/sdxl/configs"
MERGE_LIST_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCABULARY = 49408
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in a byte-level BPE, in the order CLIP numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(rest)]


def read_merges(archive: Path) -> list[str]:
    packed = archive.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != MERGE_LIST_SHA256:
        raise ValueError(f"{archive.name} has SHA-256 {found}: give CLIP's bpe_simple_vocab_16e6.txt.gz")
    count = VOCABULARY - 2 * 256 - 2
    return gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + count]  # the first line names the format


def vocabulary(merges: list[str]) -> dict[str, int]:
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, START, END])}


def special_token(text: str, normalized: bool) -> dict[str, object]:
    return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[str], pad: str) -> None:
    """A CLIPTokenizer folder. SDXL's two tokenizers differ in nothing but the token they pad with."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {
        "bos_token": special_token(START, True),
        "eos_token": special_token(END, True),
        "pad_token": pad,
        "unk_token": special_token(END, True),
    }
    settings = {"add_prefix_space": False, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False, separators=(",", ":")))
    write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))  # bytes: no other line ends on Windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merge_list", type=Path, help="bpe_simple_vocab_16e6.txt.gz")
    merges = read_merges(parser.parse_args().merge_list)
    vocab = vocabulary(merges)
    write_tokenizer(CONFIGS / "tokenizer", vocab, merges, pad=END)
    write_tokenizer(CONFIGS / "tokenizer_2", vocab, merges, pad="!")


if __name__ == "__main__":
    main()
