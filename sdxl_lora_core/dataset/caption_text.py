"""The text of captions: decoding, cleaning, searching for words, and the trigger word."""

from __future__ import annotations

import codecs
import importlib.util
import re
from collections.abc import Sequence

_BOMS = (  # UTF-32 first: its little-endian mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


# What text files had before UTF-8, most likely first: Western, Japanese, simplified and traditional Chinese, Korean,
# Cyrillic.
_LEGACY = ("cp1252", "cp932", "gb18030", "big5", "euc_kr", "cp1251")
_ENOUGH = 512  # bytes, from which the detection is reliable: shorter texts are repeated


def decode_unicode(data: bytes) -> str | None:
    """The text by its byte order mark, or as UTF-8; None if it has no mark and is not UTF-8.

    Raises ValueError for bytes that are not text.
    """
    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    try:
        text = data.decode(marked or "utf-8-sig")
    except UnicodeDecodeError as error:
        if not marked:
            return None
        raise ValueError(f"is not valid {marked}: save it as UTF-8") from error
    return _require_text(text)


def decode_legacy(data: bytes, encoding: str) -> tuple[str, str]:
    """The text and its encoding: the given one, or Latin-1, which decodes any bytes. Raises as decode_unicode."""
    try:
        return _require_text(data.decode(encoding)), encoding
    except UnicodeDecodeError:
        return _require_text(data.decode("latin-1")), "latin-1"


def legacy_encoding(texts: Sequence[bytes]) -> str:
    """The encoding of texts by one program that are not Unicode. Without charset-normalizer it is Windows-1252."""
    if not can_detect_encodings():
        return _LEGACY[0]
    from charset_normalizer import from_bytes

    joined = b"\n".join(texts) + b"\n"
    found = from_bytes(joined * (_ENOUGH // len(joined) + 1), cp_isolation=[*_LEGACY]).best()
    return found.encoding if found else _LEGACY[0]


def can_detect_encodings() -> bool:
    return importlib.util.find_spec("charset_normalizer") is not None


def _require_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("is not text, or UTF-16 without a byte order mark: save it as UTF-8")
    return text


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
