"""Who wrote each caption of a folder: a hidden JSON file beside the images.

A caption that is not in it, or that is not the text that was noted, was written or edited by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..dataset.caption_text import clean_caption
from ..files import write_text_atomic

NAME = ".sdxl_lora_captions.json"
HAND = "hand"
_VERSION = 1


@dataclass
class Authors:
    """The authors of a folder's captions by image key; `replaced` are earlier captions, the latest last."""

    folder: Path
    written: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Authors:
        """Raises ValueError for a file that is no such note: it may be all that is left of captions by hand."""
        file = folder / NAME
        if not file.is_file():
            return cls(folder)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            written, replaced = dict(found["captions"]), dict(found.get("replaced", {}))
            _ = [entry["text"] + entry["by"] for entry in written.values()]
            _ = [entry["text"] + entry["by"] for entries in replaced.values() for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{NAME} in {folder.name} is damaged, which says who wrote the captions: repair it, or remove it to "
                "count all captions as written by hand"
            ) from error
        return cls(folder, written, replaced)

    def author(self, key: str, text: str) -> str:
        """Who wrote the caption `text` of an image: the name of a model, or HAND."""
        noted = self.written.get(key)
        return noted["by"] if noted and clean_caption(noted["text"]) == clean_caption(text) else HAND

    def note(self, key: str, text: str, by: str, before: str | None) -> None:
        """Notes a caption that is about to be written over `before`, None if there is none. See save."""
        if before is not None and before != text:
            self.replaced.setdefault(key, []).append({"text": before, "by": self.author(key, before)})
        self.written[key] = {"text": text, "by": by}

    def save(self) -> None:
        """Before the captions themselves: a note of a caption that was then not written does no harm."""
        values: Mapping[str, Any] = {"version": _VERSION, "captions": self.written, "replaced": self.replaced}
        write_text_atomic(self.folder / NAME, json.dumps(values, ensure_ascii=False, indent=1))
