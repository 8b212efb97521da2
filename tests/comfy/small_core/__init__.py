"""A custom node of ComfyUI for tests: an SDXL of ComfyUI's own classes, 6 MB of random weights."""

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

SIZES = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "num_head_channels": 32,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "legacy": False,
    "dtype": torch.float32,
}


class SmallCoreSDXL:
    """A MODEL for KSampler, with a conditioning that fits it."""

    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def load(self, seed):
        config = comfy.supported_models.SDXL(dict(SIZES))
        config.set_inference_dtype(torch.float32, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = config.get_model({})
            for weight in model.parameters():
                torch.nn.init.normal_(weight, 0, 0.02)
        # From 0.16 on the class that ComfyUI gives its own models depends on the device.
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        patched = patcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))
        text = torch.zeros(1, 77, SIZES["context_dim"])
        return patched, [[text, {"pooled_output": torch.zeros(1, 1280)}]]


NODE_CLASS_MAPPINGS = {"SmallCoreSDXL": SmallCoreSDXL}
