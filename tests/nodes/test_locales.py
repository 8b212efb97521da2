"""The pack in Chinese, Japanese and Spanish: nothing is missing, nothing is left of texts that have changed."""

from __future__ import annotations

import re

import pytest

from tools.make_locales import FOLDER, LANGUAGES, SOURCES, english, read, said, translated

every_language = pytest.mark.parametrize("language", LANGUAGES)


@every_language
def test_every_text_is_translated_and_no_translation_is_stale(language: str) -> None:
    known, texts = read(SOURCES / f"{language}.json"), english()
    assert texts - set(known) == set(), "translate these"
    assert set(known) - texts == set(), "these are said no more: remove them"


@every_language
def test_the_page_has_what_the_translations_say(language: str) -> None:
    for name, values in translated(read(SOURCES / f"{language}.json")).items():
        assert read(FOLDER / language / f"{name}.json") == values, "run python -m tools.make_locales"


@every_language
def test_placeholders_and_code_stay(language: str) -> None:
    for text, translation in read(SOURCES / f"{language}.json").items():
        assert translation.strip(), text
        for pattern in (r"\{\w+\}", r"`[^`]+`", r"\b[a-z]+_[a-z_]+\.[a-z]+\b"):
            assert sorted(re.findall(pattern, text)) == sorted(re.findall(pattern, translation)), (text, translation)


@every_language
def test_tooltips_are_really_translated(language: str) -> None:
    known = read(SOURCES / f"{language}.json")
    sentences = [text for text in known if len(text) > 40]
    same = [text for text in sentences if known[text] == text]
    assert len(sentences) > 250 and not same


def test_what_the_scripts_say_is_found() -> None:
    texts = said()
    assert {"Stop and keep", "{count} images without a caption are skipped", "{number} cache", "No difference"} <= texts
    assert "step {step}" in texts and len(texts) > 50
