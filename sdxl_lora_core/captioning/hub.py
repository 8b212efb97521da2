"""Downloads a captioning model from the Hugging Face hub, when the user names one."""

from __future__ import annotations

import re
from pathlib import Path

from ..messages import brief, shown

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.txt", "*.safetensors", "model.onnx", "selected_tags.csv")


def download_model(hub_id: str, root: Path) -> Path:
    """The folder of a model in `root`, named by its id; a model that is there is not downloaded again.

    Only settings, tokenizers and weights in safetensors or ONNX are downloaded; a download that was cut off is
    continued. Raises ValueError for a text that is no id, and if the hub cannot be reached.
    """
    if not _ID.fullmatch(hub_id):
        raise ValueError(f"hub_id is {shown(hub_id)}: give owner and name, as in florence-community/Florence-2-base")
    from huggingface_hub import snapshot_download

    folder = root / hub_id.replace("/", "--")
    done = folder / ".sdxl_lora_downloaded"
    if done.is_file() and done.read_text(encoding="utf-8") == hub_id:
        return folder
    try:
        snapshot_download(hub_id, local_dir=folder, allow_patterns=list(_FILES))
    except Exception as error:  # of any type: the hub's library has many
        raise ValueError(f"{hub_id} could not be downloaded ({brief(error)}): check name and network") from error
    done.write_text(hub_id, encoding="utf-8")
    return folder
