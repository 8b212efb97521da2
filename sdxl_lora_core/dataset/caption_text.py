"""The text of captions: decoding, cleaning, searching for words, and the trigger word."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

_BOMS = (  # UTF-32 first: its little-endian mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def decode_text(data: bytes) -> tuple[str, str]:
    """Returns the text and the encoding: that of the byte order mark, else the first of UTF-8, Windows-1252 and
    Latin-1 that decodes it.

    Raises ValueError for bytes that are not text.
    """
    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    try:
        text, encoding = (data.decode(marked), marked) if marked else _decode_unmarked(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid {marked}: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("is not text, or UTF-16 without a byte order mark: save it as UTF-8")
    return text, encoding


def clean_caption(text: str) -> str:
    """One line of valid Unicode without control characters (logs and web pages show captions) and double spaces."""
    return " ".join(_CONTROL.sub(" ", valid_unicode(text)).split())


def contains_word(text: str, word: str) -> bool:
    """Whether `text` contains `word` as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates replaced: file names and JSON may contain them, but they cannot be hashed."""
    return text.encode("utf-8", "replace").decode("utf-8")


def with_trigger_word(caption: str, trigger_word: str) -> str:
    """`trigger, caption`, or the caption alone if it already contains the trigger as whole words, in any case."""
    trigger = clean_caption(trigger_word)
    if not trigger or contains_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}"


def split_tags(text: str, separator: str) -> list[str]:
    """The tags of a caption without surrounding spaces; empty ones are left out."""
    return [tag for part in text.split(separator) if (tag := part.strip())]


def pinned_tags(tags: Sequence[str], words: Sequence[str]) -> list[str]:
    """The tags that are never moved or dropped: each trigger word itself, else the tags that contain it."""
    pinned: set[str] = set()
    for word in words:
        equal = [tag for tag in tags if tag.casefold() == word.casefold()]
        pinned.update(equal or tags_with(tags, [word]))
    return [tag for tag in tags if tag in pinned]


def tags_with(tags: Sequence[str], words: Sequence[str]) -> list[str]:
    """The tags that contain one of the words."""
    return [tag for tag in tags if any(contains_word(tag, word) for word in words)]


def _decode_unmarked(data: bytes) -> tuple[str, str]:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"
