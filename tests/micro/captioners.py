"""Random captioning models and taggers of a few channels, as folders on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = ("a", "photo", "of", "red", "blue", "green", "circle", "square", "on", "white", "what", "is", "the", "image")
TAGS = (("general", "9"), ("1girl", "0"), ("long_hair", "0"), ("^_^", "0"), ("hatsune_miku", "4"))


def write_blip(folder: Path, seed: int = 0) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    folder.mkdir(parents=True)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    size = len(special) + len(WORDS)
    text = {
        **{"vocab_size": size, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "projection_dim": 16},
        **{"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3},
    }
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 16},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
        _spread(model)
    model.text_decoder.cls.predictions.bias.data[:6] -= 2  # words rather than the end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_florence(folder: Path, seed: int = 0) -> None:
    from transformers import CLIPImageProcessorPil, Florence2Config, Florence2ForConditionalGeneration

    tokenizer = _byte_tokenizer({"image_token": "<image>"})
    text = {
        **{"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "max_position_embeddings": 256},
        **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        **{"decoder_start_token_id": 2, "forced_eos_token_id": 2, "forced_bos_token_id": 0},
    }
    vision = {
        **{"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]},
        **{"patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2]},
        **{"window_size": 4, "projection_dim": 16, "drop_path_rate": 0.0},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Florence2ForConditionalGeneration(
            Florence2Config(
                text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
            )
        )
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = (32 // 8) ** 2 + 1  # patches of the last stage, and their mean
    processor = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"image_seq_length": tokens}
    file.write_text(json.dumps(settings), encoding="utf-8")


def write_blip_2(folder: Path, with_t5: bool = False) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessorPil

    tokenizer = _byte_tokenizer({})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    opt = {
        **{"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128},
    }
    t5 = {
        **{"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "decoder_start_token_id": 1,
    }
    config = Blip2Config(
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        qformer_config={**sizes, "encoder_hidden_size": 16, "vocab_size": 8, "max_position_embeddings": 64},
        text_config={**(t5 if with_t5 else opt), **ids},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Blip2ForConditionalGeneration(config)
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def _byte_tokenizer(named: dict[str, str]) -> Any:
    """A token for each byte; `named` are special tokens with a name of their own."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    special = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def _spread(model: torch.nn.Module) -> None:
    """Larger weights, so that different images get different words."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4 if "vision" in name else 0.2)


def write_onnx_tagger(folder: Path, side: int = 4) -> None:
    """Tags by colour: 1girl by blue, long_hair by green, ^_^ by red, hatsune_miku by all, each from 0 to 1."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True)
    weights = np.zeros((3, len(TAGS)), dtype=np.float32)
    weights[:, 0], weights[0, 1], weights[1, 2], weights[2, 3], weights[:, 4] = 1, 1, 1, 1, 1 / 3
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("Div", ["mean", "white"], ["share"]),
            helper.make_node("MatMul", ["share", "weights"], ["tags"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [None, side, side, 3])],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [None, len(TAGS)])],
        [
            numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
            numpy_helper.from_array(np.array(255, dtype=np.float32), "white"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    rows = "\n".join(f"{number},{name},{category},1" for number, (name, category) in enumerate(TAGS))
    (folder / "selected_tags.csv").write_text(f"tag_id,name,category,count\n{rows}\n", encoding="utf-8")


def write_classifier(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    labels = {0: "long_hair", 1: "smile", 2: "outdoors"}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=16, id2label=labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_pictures(folder: Path, count: int = 6) -> list[Path]:
    """Images in different colours and sizes, without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        paths.append(folder / f"{number:02d}.png")
        coarse.resize((96 + 16 * (number % 3), 96), Image.Resampling.BICUBIC).save(paths[-1])
    return paths
