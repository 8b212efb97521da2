"""Run by test_prompts.py on ComfyUI's Python, in its folder: what does ComfyUI make of prompts for SDXL?

Argument: a JSON file that names `prompts`, a folder of `embeddings`, and optionally `encoders` (weights and sizes of
two small text encoders) with a file for the `results`. Prints the ids and weights of each prompt's chunks, and vectors
as lists.
"""

import json
import sys
from pathlib import Path

request = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

PADS = {"clip_l": 49407, "clip_g": 0}


def small_model(encoders: dict) -> comfy.sdxl_clip.SDXLClipModel:
    """ComfyUI's SDXL text model around encoders of other sizes."""
    model = comfy.sdxl_clip.SDXLClipModel.__new__(comfy.sdxl_clip.SDXLClipModel)
    torch.nn.Module.__init__(model)
    for name, encoder in encoders.items():
        clip = comfy.sd1_clip.SDClipModel(
            layer="hidden",
            layer_idx=-2,
            dtype=torch.float32,
            layer_norm_hidden_state=False,
            textmodel_json_config=encoder["config"],
            special_tokens={"start": 49406, "end": 49407, "pad": PADS[name]},
        )
        weights = safetensors.torch.load_file(encoder["weights"])
        if (projection := weights.pop("text_projection.weight", None)) is not None:
            clip.transformer.text_projection = torch.nn.Linear(*reversed(projection.shape), bias=False)
            clip.transformer.text_projection.weight.data = projection
        missing, unknown = clip.transformer.load_state_dict(weights, strict=False)
        assert not unknown and set(missing) <= {"text_projection.weight"}, (missing, unknown)
        setattr(model, name, clip)
    return model


def plain(token: object) -> object:
    return token.tolist() if torch.is_tensor(token) else token


tokenizer = comfy.sdxl_clip.SDXLTokenizer(embedding_directory=request["embeddings"])
tokens = [tokenizer.tokenize_with_weights(prompt) for prompt in request["prompts"]]
if "encoders" in request:
    model = small_model(request["encoders"])
    with torch.no_grad():
        results = [model.encode_token_weights(rows) for rows in tokens]
    tensors = {
        f"{number}.{name}": one[side].contiguous()
        for number, one in enumerate(results)
        for side, name in enumerate(("hidden", "pooled"))
    }
    safetensors.torch.save_file(tensors, request["results"])
read = [
    {key: [[(plain(token), weight) for token, weight in row] for row in rows] for key, rows in one.items()}
    for one in tokens
]
sys.stdout.write("\n" + json.dumps(read))
