"""The settings of captions, masks, regularisation images and new tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...messages import shown
from ...settings import NOT_EMPTY, Range, setting
from ...text.encoding import CHUNK_TOKENS, TokenIds

_NAME = re.compile(r"\w[\w-]*", re.ASCII)
_CHANGED = {"shuffle_tags": (True,), "tag_dropout": NOT_EMPTY}  # either of them changes captions


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """How captions, masks and regularisation images are used, and which new tokens are trained."""

    caption_dropout: float = setting(
        0.0, "Share of training images that are trained with an empty caption.", Range(0, 1, step=0.05)
    )
    shuffle_tags: bool = setting(
        False,
        "Shuffles the tags of a caption, so that no tag is learned by its position. For lists of tags, not for "
        "sentences.",
    )
    keep_tags: int = setting(
        0,
        "Number of tags after the trigger word that are never shuffled or dropped.",
        Range(0, 1000),
        only_with=_CHANGED,
    )
    tag_dropout: float = setting(
        0.0,
        "Share of the tags dropped at random, so that the LoRA does not need all of them in a prompt.",
        Range(0, 1, step=0.05),
    )
    tag_separator: str = setting(",", "The separator between two tags in a caption.", only_with=_CHANGED)
    caption_variants: int = setting(
        8,
        "How many shuffled variants of each caption are encoded and sampled from. More give more variety; each takes "
        "about 0.3 MB of disk.",
        Range(1, 1000),
        only_with=_CHANGED,
    )
    caption_chunks: int = setting(
        1,
        "How much of a long caption is encoded: 1 is 75 tokens, 2 is 150, 3 is 225. Raise it when the report names "
        "truncated captions.",
        Range(1, 3),
    )
    masked_loss: bool = setting(
        False,
        "Trains only where the mask is white: the image of the same name in the dataset's masks folder, or the image's "
        "own alpha channel.",
    )
    prior_weight: float = setting(1.0, "Loss weight of regularisation images.", Range(0, 10, step=0.1))
    class_prompt: str = setting(
        "",
        "The class of the trained subject, such as 'a photo of a cat' for your cat. The base generates such images "
        "once, and they are trained as regularisation images. Unused if the dataset has its own.",
    )
    class_images: int = setting(
        0,
        "How many images are generated from class_prompt. 0: one for each training image.",
        Range(0, 1000),
        only_with={"class_prompt": NOT_EMPTY},
    )
    new_tokens: str = setting(
        "",
        "Tokens to train in both text encoders (textual inversion), such as 'ohwx=cat', initialised as cat, or 'ohwx', "
        "initialised at random. For things that no word describes; the captions must contain them.",
    )
    vectors_per_token: int = setting(
        1,
        "Embedding vectors per new token. 2 to 8 hold more detail and take as many tokens of a prompt.",
        Range(1, 75),
        only_with={"new_tokens": NOT_EMPTY},
    )
    token_learning_rate: float = setting(
        1e-3,
        "Learning rate of the new tokens. Lower it if images with them look wrong.",
        Range(1e-8, 1, step=1e-4),
        only_with={"new_tokens": NOT_EMPTY},
    )


def read_new_tokens(text: str, vectors_per_token: int) -> dict[str, str]:
    """Parses `"ohwx=cat, zwx"` into the word that initialises each new token, empty for a random start.

    Raises ValueError for an invalid name, a duplicate, and more vectors than fit into a prompt.
    """
    tokens: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, start = (part.strip() for part in entry.partition("="))
        if not _NAME.fullmatch(name):
            raise ValueError(f"new_tokens names {shown(name)}: use letters, digits, - and _ as in 'ohwx' or 'ohwx=cat'")
        if name.lower() in map(str.lower, tokens):
            raise ValueError(f"new_tokens names {name} twice: remove one")
        tokens[name] = start
    if len(tokens) * vectors_per_token > CHUNK_TOKENS:
        raise ValueError(
            f"new_tokens has {len(tokens)} words and vectors_per_token is {vectors_per_token}: a prompt has at most "
            f"{CHUNK_TOKENS} tokens, so lower vectors_per_token"
        )
    return tokens


def tokens_of(settings: CaptionSettings) -> dict[str, str]:
    """The new tokens of a run, each with the word that initialises it."""
    return read_new_tokens(settings.new_tokens, settings.vectors_per_token)


def placeholder_ids(settings: CaptionSettings) -> TokenIds:
    """Token ids beyond any vocabulary, to count tokens before the text encoders are loaded."""
    return dict.fromkeys(tokens_of(settings), [2**31 - 1] * settings.vectors_per_token)


def check_captions(settings: CaptionSettings) -> None:
    if not settings.tag_separator:
        raise ValueError("tag_separator is empty: set it to the text between two tags, such as a comma")
    if any(ord(letter) < 32 for letter in settings.tag_separator):
        raise ValueError(
            f"tag_separator is {settings.tag_separator!r}, which no caption contains, because captions are one line: "
            "use the text between two tags, such as a comma"
        )
