from collections.abc import Sequence

import torch

from .model_patcher import ModelPatcher

class LoadedModel:
    @property
    def model(self) -> ModelPatcher | None: ...

current_loaded_models: list[LoadedModel]
in_training: bool  # newer ComfyUIs only

def get_torch_device() -> torch.device: ...
def load_models_gpu(
    models: Sequence[ModelPatcher], memory_required: int = 0, *, force_full_load: bool = False
) -> None: ...
def unload_all_models() -> None: ...
def soft_empty_cache() -> None: ...
def throw_exception_if_processing_interrupted() -> None: ...
