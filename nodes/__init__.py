"""The nodes of the pack, by id. Ids are frozen: saved graphs name them."""

import functools

from . import choices
from .apply_lora_stack import ApplyLoRAStack
from .base_model import LoadSD15Base, LoadSDXLBase
from .caption_images import CaptionImages
from .compare_loras import CompareLoRAs, CompareVariant
from .control import AddControlNet
from .dataset import LoadCaptionDataset
from .dataset_images import DatasetImages
from .dataset_report import DatasetReport
from .distribution_metrics import DistributionMetrics
from .filter_by_score import FilterByScore
from .generation import SDXLGenerateCached
from .host.dataset_routes import add_dataset_routes
from .host.folders import add_output_folders
from .host.lora_routes import add_lora_routes
from .host.server import add_routes
from .host.service import add_service_routes
from .host.vote_routes import add_vote_routes
from .human_compare import HumanCompare
from .image_cache import SDXLImageCache
from .image_similarity import ImageSimilarity
from .load_lora import LoadLoRA
from .pick_checkpoint import FindStrength, PickCheckpoint
from .save_loras import MergeLoRAs, SaveSDXLLoRA
from .save_merged_base import SaveMergedBase
from .scoring import CLIPScore
from .service import read_job
from .stack_report import StackReport
from .train_options import (
    AdapterOptions,
    CaptionOptions,
    LossOptions,
    MemoryOptions,
    OptimizerOptions,
    WatchOptions,
)
from .training import TrainSDXLLoRA

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LoadCaptionDataset": LoadCaptionDataset,
    "LoadSDXLBase": LoadSDXLBase,
    "TrainSDXLLoRA": TrainSDXLLoRA,
    "LoadLoRA": LoadLoRA,
    "SDXLGenerateCached": SDXLGenerateCached,
    "CLIPScore": CLIPScore,
    "AdapterOptions": AdapterOptions,
    "LossOptions": LossOptions,
    "OptimizerOptions": OptimizerOptions,
    "CaptionOptions": CaptionOptions,
    "WatchOptions": WatchOptions,
    "MemoryOptions": MemoryOptions,
    "SDXLImageCache": SDXLImageCache,
    "SaveSDXLLoRA": SaveSDXLLoRA,
    "MergeLoRAs": MergeLoRAs,
    "SaveMergedBase": SaveMergedBase,
    "ApplyLoRAStack": ApplyLoRAStack,
    "AddControlNet": AddControlNet,
    "DatasetImages": DatasetImages,
    "StackReport": StackReport,
    "ImageSimilarity": ImageSimilarity,
    "DistributionMetrics": DistributionMetrics,
    "FilterByScore": FilterByScore,
    "CompareVariant": CompareVariant,
    "CompareLoRAs": CompareLoRAs,
    "PickCheckpoint": PickCheckpoint,
    "FindStrength": FindStrength,
    "DatasetReport": DatasetReport,
    "CaptionImages": CaptionImages,
    "HumanCompare": HumanCompare,
    "LoadSD15Base": LoadSD15Base,
}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LoadCaptionDataset": "Load Caption Dataset",
    "LoadSDXLBase": "Load SDXL Base",
    "TrainSDXLLoRA": "Train SDXL LoRA",
    "LoadLoRA": "Load LoRA (SDXL)",
    "SDXLGenerateCached": "SDXL Generate (cached)",
    "CLIPScore": "CLIP Score",
    "AdapterOptions": "Train Options: Adapter",
    "LossOptions": "Train Options: Loss",
    "OptimizerOptions": "Train Options: Optimizer",
    "CaptionOptions": "Train Options: Captions",
    "WatchOptions": "Train Options: Watching",
    "MemoryOptions": "Train Options: Memory",
    "SDXLImageCache": "SDXL Image Cache",
    "SaveSDXLLoRA": "Save LoRA (SDXL)",
    "MergeLoRAs": "Merge LoRAs (SDXL)",
    "SaveMergedBase": "Save Merged Base (SDXL)",
    "ApplyLoRAStack": "Apply LoRA Stack",
    "AddControlNet": "Add ControlNet (SDXL)",
    "DatasetImages": "Dataset Images",
    "StackReport": "LoRA Stack Report",
    "ImageSimilarity": "Image Similarity",
    "DistributionMetrics": "Distribution Metrics",
    "FilterByScore": "Filter by Score",
    "CompareVariant": "Compare: Add Variant",
    "CompareLoRAs": "Compare LoRAs",
    "PickCheckpoint": "Pick Checkpoint",
    "FindStrength": "Find Strength",
    "DatasetReport": "Dataset Report",
    "CaptionImages": "Caption Images",
    "HumanCompare": "Human Compare",
    "LoadSD15Base": "Load SD 1.5 Base",
}

add_output_folders()
add_routes()
add_lora_routes(functools.partial(choices.find, "lora"))
add_dataset_routes(functools.partial(choices.names, "dataset"), functools.partial(choices.find, "dataset"))
add_vote_routes()
add_service_routes(read_job)
