"""Run by test_lora_keys.py on ComfyUI's Python, in its folder: which keys of LoRAs does ComfyUI apply to SDXL?

Arguments: LoRA files, or `--weights IN OUT` and one LoRA file: the weights in IN as that file changes them, to OUT, or
`--prompt FOLDER TEXT`: what each text encoder gets for TEXT with the embeddings in FOLDER, or `--save IN OUT KIND`:
ComfyUI's own LoRA of the differences in IN, to OUT. Those of the UNet are named as kohya does, by `_` for `.`.
"""

import json
import logging
import sys
from pathlib import Path

arguments = sys.argv[1:]
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.lora  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

SDXL = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 2816, "in_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_temporal_attention": False,
    "use_temporal_resblock": False,
}  # fmt: skip

complaints: list[str] = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: complaints.append(record.getMessage())
logging.getLogger().addHandler(handler)

model = comfy.supported_models.SDXL(SDXL).get_model({}, "", device="meta")
clip = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16)
keys = comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(model, {}))


def patches_of(path: str) -> dict:
    return comfy.lora.load_lora(comfy.utils.load_torch_file(path, safe_load=True), keys)


def applied_keys(path: str) -> dict:
    complaints.clear()
    patches = patches_of(path)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    text_patcher = comfy.model_patcher.ModelPatcher(clip, torch.device("cpu"), torch.device("cpu"))
    applied = [*patcher.add_patches(patches), *text_patcher.add_patches(patches)]
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = len(file.keys())
    return {"tensors": tensors, "patches": len(patches), "applied": len(applied), "complaints": list(complaints)}


def write_changed(weights_path: str, out: str, lora_path: str) -> dict:
    weights = comfy.utils.load_torch_file(weights_path, safe_load=True)
    patches = patches_of(lora_path)
    changed = {
        key: comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], weight, key)
        for key, weight in weights.items()
    }
    safetensors.torch.save_file({key: weight.contiguous() for key, weight in changed.items()}, out)
    return {"patches": len(patches), "complaints": list(complaints)}


def tokens_of(folder: str, text: str) -> dict:
    """Ids, and the values of vectors in their place."""
    tokenizer = comfy.sdxl_clip.SDXLTokenizer(embedding_directory=folder)
    return {
        encoder: [token.tolist() if torch.is_tensor(token) else token for token, _ in rows[0]]
        for encoder, rows in tokenizer.tokenize_with_weights(text).items()
    }


class WholeInMemory:
    """A model, and each of its modules: none keeps weights elsewhere that would have to be fetched."""

    def __getattr__(self, name: str) -> object:
        if name == "comfy_cast_weights":
            raise AttributeError(name)
        return self


class Difference:
    """What ModelSubtract and CLIPSubtract give, as far as saving needs it."""

    model = WholeInMemory()

    def __init__(self, tensors: dict) -> None:
        self.tensors = tensors

    def model_state_dict(self, filter_prefix: str) -> dict:
        return self.tensors


def save_difference(differences_path: str, out: str, kind: str) -> dict:
    import comfy_extras.nodes_lora_extract as extract

    comfy.model_management.load_models_gpu = lambda *_, **__: None
    given = comfy.utils.load_torch_file(differences_path, safe_load=True)
    own = [key.removeprefix("diffusion_model.") for key in model.state_dict() if key.startswith("diffusion_model.")]
    flat = {".".join([path.replace(".", "_"), leaf]): f"diffusion_model.{path}.{leaf}"
            for path, _, leaf in (key.rpartition(".") for key in own)}  # fmt: skip
    unet = {flat[key]: tensor for key, tensor in given.items() if key in flat}
    text = {key: given[key] for key in clip.state_dict() if key in given}
    saved = {}
    for tensors, inside, prefix in ((unet, "diffusion_model.", "diffusion_model."), (text, "", "text_encoders.")):
        extract.calc_lora_model(
            Difference(tensors), 2, inside, prefix, saved, extract.LORA_TYPES[kind], bias_diff=True
        )  # fmt: skip
    comfy.utils.save_torch_file(saved, out)
    return {"given": len(given), "taken": len(unet) + len(text)}


modes = {"--save": save_difference, "--weights": write_changed, "--prompt": tokens_of}
mode = modes.get(arguments[0])
result = mode(*arguments[1:]) if mode else [applied_keys(path) for path in arguments]
sys.stdout.write(json.dumps(result))
