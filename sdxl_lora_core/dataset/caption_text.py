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


# Of text files that are not Unicode: Western, Japanese, simplified and traditional Chinese, Korean, Cyrillic.
_WESTERN, *_OTHERS = ("cp1252", "cp932", "gb18030", "big5", "euc_kr", "cp1251")
_ENOUGH = 512  # bytes: shorter texts are repeated, because the detection does not judge very short ones
# Bytes that hardly occur in Western texts: three accented letters or four other signs in a row, and Japanese kana.
_FOREIGN = re.compile(rb"[\xc0-\xff]{3}|[\xa1-\xfe]{4}|\x82[\x9f-\xf1]|\x83[\x40-\x96]")
# What Western bytes become in the other encodings: words of two scripts, half-width and unassigned letters, and
# Cyrillic words of one letter.
_UNLIKELY = re.compile(
    r"[a-zA-Z][^\W\d_\x00-\u024f]|[^\W\d_\x00-\u024f][a-zA-Z]|[\uff61-\uff9f\ue000-\uf8ff]"
    r"|(?<![\u0400-\u04ff])[\u0400-\u04ff](?![\u0400-\u04ff])"
)


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


def decode_legacy(data: bytes, usual: str) -> tuple[str, str]:
    """The text and its encoding. `usual` is that of the other texts of the folder (see legacy_encoding).

    A text is taken for Western unless its bytes are unlike it, or the usual encoding makes words of it; Latin-1 decodes
    what Windows-1252 does not. Raises as decode_unicode, also for damaged UTF-8.
    """
    _require_no_damaged_utf8(data)
    foreign = _FOREIGN.search(data) is not None
    for encoding in [usual, legacy_encoding([data])] if foreign else [usual]:
        text = _decoded(data, encoding)
        if encoding != _WESTERN and text is not None and (foreign or not _UNLIKELY.search(text)):
            return _require_text(text), encoding
    western = _decoded(data, _WESTERN)
    return (_require_text(data.decode("latin-1")), "latin-1") if western is None else (_require_text(western), _WESTERN)


def legacy_encoding(texts: Sequence[bytes]) -> str:
    """The encoding of those texts that are neither Unicode nor Western; Windows-1252 if there are none.

    It is detected by charset-normalizer, where that is installed.
    """
    joined = b"\n".join([*filter(_FOREIGN.search, texts), b""])
    if not joined or not can_detect_encodings():
        return _WESTERN
    from charset_normalizer import from_bytes

    found = from_bytes(joined * (_ENOUGH // len(joined) + 1), cp_isolation=[*_OTHERS]).best()
    return found.encoding if found else _WESTERN


def can_detect_encodings() -> bool:
    return importlib.util.find_spec("charset_normalizer") is not None


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _require_no_damaged_utf8(data: bytes) -> None:
    """Raises ValueError for a text that is UTF-8 but for a few bytes, such as one that was cut off."""
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    whole = sum(not letter.isascii() for letter in text) - broken
    if broken and whole >= 2 * broken:
        raise ValueError(f"is UTF-8 with damaged characters ({broken}): write it again")


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
