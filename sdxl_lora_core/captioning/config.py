"""The settings of captioning a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import Range, check_settings, setting

Detail = Literal["short", "detailed", "very_detailed"]
Existing = Literal["keep", "replace_generated", "replace_all"]
Target = Literal["text_files", "metadata_csv"]

LONGEST = 1024  # tokens
TOKENS: dict[Detail, int] = {"short": 48, "detailed": 128, "very_detailed": 384}


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How a folder is captioned."""

    trigger_word: str = setting("", "The word that the LoRA is called by. It begins each caption that lacks it.")
    prefix: str = setting("", "Text before each caption, separated by a comma.")
    suffix: str = setting("", "Text after each caption, separated by a comma.")
    detail: Detail = setting(
        "detailed",
        "How much a model writes. Florence-2 has a task for each; other models only write more words.",
    )
    existing: Existing = setting(
        "keep",
        "Images that have a caption. keep: they are left out. replace_generated: captions written by this node are "
        "written again, unless they were edited. replace_all: all are; those written by hand are kept in the folder's "
        ".sdxl_lora_captions.json.",
    )
    write_to: Target = setting(
        "text_files",
        "Where new captions are written. text_files: one beside each image, or in captions/ beside images/. "
        "metadata_csv: metadata.csv with file_name and caption. A caption in metadata.csv stays there.",
    )
    prompt: str = setting(
        "",
        "What a BLIP model begins with, as in `a photo of`, or is asked. Florence-2 and taggers do not use it.",
    )
    max_tokens: int = setting(
        0, "The longest caption of a model in tokens. 0: 48, 128 or 384, by detail.", Range(0, LONGEST)
    )
    beams: int = setting(3, "Beam search: how many beginnings a model follows. 1 is fastest.", Range(1, 16))
    batch_size: int = setting(4, "Images captioned together. More is faster and needs more memory.", Range(1, 64))
    tag_threshold: float = setting(
        0.35, "With a tagger: the probability from which a tag is written.", Range(0.01, 0.99, step=0.01, rounded=True)
    )
    character_threshold: float = setting(
        0.75, "The same for the names of characters.", Range(0.01, 0.99, step=0.01, rounded=True)
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def tokens(self) -> int:
        return self.max_tokens or TOKENS[self.detail]
