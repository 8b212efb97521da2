"""Prompts as ComfyUI's own tokenizer and text model read them, token for token and number for number."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.prompt_reader import PromptReader
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers
from sdxl_lora_core.sdxl.family import ENCODERS
from sdxl_lora_core.text.encoding import token_ids
from sdxl_lora_core.text.prompt_syntax import chunked
from sdxl_lora_core.text.text_model import TextModel

WIDTHS = {"clip_l": 64, "clip_g": 96}  # of tiny-sdxl
LONG = "a very long prompt, " * 20
PROMPTS = [
    "",
    " ",
    "a red heart",
    "a (red:1.2) heart",
    "(a) ((b)) (((c:0.3)))",
    "((a:1.5) b:0.7) c",
    "(a:b) (:1.2) () (a:)",
    r"\(a\) (b\):1.3) \\(c:2)",
    "(a",
    "((a)",
    "a) (b:2) c",
    "a)) (b:2) ((c:1.4)) d",
    "((a) (b:0.2)",
    "(a:-1), (b: 2 ), (c:1e-1)",
    "a embedding:cat b",
    "(embedding:cat:1.3), red",
    "embedding:cat, red\nembedding:many",
    "an embedding: cat,, and",
    "a,embedding:cat",
    "(embedding:cat, embedding:many:0.8)",
    "embedding:cat.safetensors",
    "embedding:deep,",
    LONG,
    f"({LONG}:1.1), {LONG}",
    f"{LONG}(seven small words of one piece:1.2)(x:0.9)" * 3,
    "(word:1.1) " * 90,
    f"{LONG[:220]} embedding:many, (and on:1.3)",
    "embedding:many " * 12,
    "naïve café, \u732b! \U0001f600 (é:1.2)",
    "A  B\t(C\n:1.1)\r\n",
    'it\'s 3.5 "quotes" & <|endoftext|> [x] {y|z} BREAK AND',
    "1girl, solo, (masterpiece, best quality:1.2), (smile:0.8)!",
]


def random_prompts(count: int) -> list[str]:
    draw = random.Random(7)
    bits = [
        "(",
        ")",
        "(",
        ")",
        ":1.2)",
        ":0.7)",
        "\\(",
        "\\)",
        " ",
        "cat",
        " a red house ",
        ", ",
        ":",
        "!",
        "\n",
        " embedding:cat ",
        "\nembedding:many, ",
        "long words together in a row of ten tokens ",
    ]
    return ["".join(draw.choices(bits, k=draw.randint(1, 40))) for _ in range(count)]


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    folder = tmp_path / "embeddings"
    (folder / "below").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for name, count in (("cat", 1), ("many", 9), ("below/deep", 2)):
        rows = {"clip_l": torch.randn(count, 8, generator=draw), "clip_g": torch.randn(count, 12, generator=draw)}
        save_file(rows, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def reader(embeddings: Path) -> PromptReader:
    def find(name: str) -> Path | None:
        return next(iter(embeddings.rglob(f"{name.removesuffix('.safetensors')}.safetensors")), None)

    return PromptReader(GenerateConfig(prompt="", prompt_syntax="comfy"), find)


def ask(comfyui: Path, python: str, folder: Path, **request: Any) -> Any:
    (folder / "request.json").write_text(json.dumps(request))
    command = [python, str(Path(__file__).with_name("prompts.py")), str(folder / "request.json")]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(reader: PromptReader, prompt: str, tokenizers: Any, part: Any) -> list[list[tuple[Any, float]]]:
    """Chunks of 77 as ComfyUI's tokenizer gives them: ids, or vectors in their place, with weights."""
    groups, tokenizer = [], tokenizers[0]
    for content, weight in reader.parse(prompt).reading.pieces:
        tokens = token_ids(content, tokenizer, {}) if isinstance(content, str) else content.vectors()[part].tolist()
        groups.append([(token, weight) for token in tokens])
    pad = (tokenizers[ENCODERS.index(part)].pad_token_id, 1.0)
    return [
        [(tokenizer.bos_token_id, 1.0), *row, (tokenizer.eos_token_id, 1.0), *[pad] * (75 - len(row))]
        for row in chunked(groups)  # type: ignore[arg-type]
    ]


def test_tokens_and_weights_are_comfyuis(
    comfyui: Path, comfyui_python: str, micro_base: SDXLBase, embeddings: Path, reader: PromptReader, tmp_path: Path
) -> None:
    prompts, tokenizers = PROMPTS + random_prompts(300), load_tokenizers(micro_base)
    theirs = ask(comfyui, comfyui_python, tmp_path, prompts=prompts, embeddings=str(embeddings))
    for prompt, wanted in zip(prompts, theirs, strict=True):
        for key, part in zip("lg", ENCODERS, strict=True):
            found = ours(reader, prompt, tokenizers, part)
            assert [[list(pair) for pair in row] for row in found] == wanted[key], f"{key} of {prompt!r}"


def test_embeddings_are_comfyuis(
    comfyui: Path, comfyui_python: str, micro_base: SDXLBase, embeddings: Path, reader: PromptReader, tmp_path: Path
) -> None:
    encoders: list[Any] = [load_part(micro_base, part, torch.float32) for part in ENCODERS]
    request = {}
    for name, encoder in zip(("clip_l", "clip_g"), encoders, strict=True):
        weights = {"text_model." + key.removeprefix("text_model."): rows for key, rows in encoder.state_dict().items()}
        weights = {key.replace("text_model.text_projection", "text_projection"): rows for key, rows in weights.items()}
        save_file({key: rows.contiguous() for key, rows in weights.items()}, tmp_path / f"{name}.safetensors")
        request[name] = {"config": encoder.config.to_dict(), "weights": str(tmp_path / f"{name}.safetensors")}
    results = tmp_path / "results.safetensors"
    ask(
        comfyui,
        comfyui_python,
        tmp_path,
        prompts=PROMPTS,
        embeddings=str(embeddings),
        encoders=request,
        results=str(results),
    )
    wanted = load_file(results)
    model = TextModel(load_tokenizers(micro_base), encoders)
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            hidden, pooled = model(reader.parse(prompt).reading, {})
        for name, found in (("hidden", hidden), ("pooled", pooled)):
            theirs = wanted[f"{number}.{name}"]
            assert found.shape == theirs.shape, f"{name} of {prompt!r}"
            assert (found - theirs).abs().max() <= 1e-5 * theirs.abs().max(), f"{name} of {prompt!r}"


def picture(prompt: str, **changes: Any) -> dict[str, Any]:
    inputs = {
        "base": ["base", 0],
        "prompt": prompt,
        "negative_prompt": "(blurry:0.8)",
        "seed": 1,
        "steps": 2,
        "guidance": 5.0,
        "width": 64,
        "height": 64,
        "count": 1,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "use",
        "prompt_syntax": "comfy",
        **changes,
    }
    return {
        "base": {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "fp32"}},
        "picture": {"class_type": "SDXLGenerateCached", "inputs": inputs},
    }


def test_the_node_takes_embeddings_from_comfyuis_folders(server: Any) -> None:
    def write(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        rows = {key: torch.randn(1, width, generator=draw) for key, width in WIDTHS.items()}
        folder = server.base / "models/embeddings/mine"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(rows, folder / "cat.safetensors")

    def shown(workflow: dict[str, Any]) -> Any:
        return server.run(workflow)["picture"]["images"]

    write(1)
    asked = picture("a (red:1.3) embedding:cat, circle")
    first = shown(asked)
    assert first != shown(picture("a (red:1.3) circle")) and first == shown(asked)
    write(2)
    assert first != shown(asked), "ComfyUI has to run the node anew when the file changed"
    missing = server.failure(picture("a embedding:dog circle"))
    assert "names embedding:dog, and no embeddings folder has it: put dog.safetensors into one" in missing
    told = picture("a circle", original_width=32, crop_left=16, long_prompts="chunks", prompt_syntax="plain")
    assert shown(told) != shown(picture("a circle", prompt_syntax="plain"))
