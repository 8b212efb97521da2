"""What is shown with an image: its caption's tags, masks, regularisation and new tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...settings import SOMETHING, fields_of, setting
from ...text.encoding import CHUNK_TOKENS, TokenIds

_NAME = re.compile(r"\w[\w-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What a step sees of the dataset: captions, masks, regularisation images, new tokens."""

    caption_dropout: float = setting(
        0.0, "Share of training images shown without their caption.", low=0, high=1, step=0.05
    )
    shuffle_tags: bool = setting(
        False,
        "Shows the tags of a caption in changing order, so that no tag is learned for its place. "
        "For lists of tags, not for sentences.",
        group="captions",
    )
    keep_tags: int = setting(
        0,
        "The first tags of a caption, after the trigger word, that are never moved or left out.",
        low=0,
        high=1000,
        group="captions",
    )
    tag_dropout: float = setting(
        0.0,
        "Share of the tags left out at random, so that the LoRA does not need all of them in a prompt.",
        low=0,
        high=1,
        step=0.05,
        group="captions",
    )
    tag_separator: str = setting(",", "What stands between two tags in a caption.", group="captions")
    caption_variants: int = setting(
        8,
        "How many shuffled or thinned forms of each caption are encoded and drawn from. "
        "More are more varied; each takes about 0.3 MB of disk.",
        low=1,
        high=1000,
        group="captions",
    )
    caption_chunks: int = setting(
        1,
        "How much of a long caption is read: 1 is 75 tokens, 2 is 150, 3 is 225. "
        "Raise it when the report names captions that are cut.",
        low=1,
        high=3,
        group="captions",
    )
    masked_loss: bool = setting(
        False,
        "Learns only what the mask shows: the image of the same name in the dataset's masks folder (white is learned), "
        "or the image's own alpha channel.",
        group="captions",
    )
    prior_weight: float = setting(
        1.0, "How much regularisation images count beside training images.", low=0, high=10, step=0.1, group="captions"
    )
    class_prompt: str = setting(
        "",
        "What the trained subject is one of, 'a photo of a cat' for your cat. The base draws such images once and the "
        "training keeps them as they are. Unused where the dataset has regularisation images.",
        group="captions",
    )
    class_images: int = setting(
        0,
        "How many images are drawn from class_prompt. 0: one for each training image.",
        low=0,
        high=1000,
        group="captions",
    )
    new_tokens: str = setting(
        "",
        "Words that both text encoders learn (textual inversion), such as 'ohwx=cat', which starts as cat, or 'ohwx', "
        "which starts at random. For what no word describes; the captions have to hold them.",
        group="captions",
    )
    vectors_per_token: int = setting(
        1,
        "How many vectors each new token has. 2 to 8 hold more detail, and take as many tokens of a prompt.",
        low=1,
        high=75,
        group="captions",
        only_with=("new_tokens", SOMETHING),
    )
    token_learning_rate: float = setting(
        1e-3,
        "Learning rate of the new tokens. Lower it if images with them turn strange.",
        low=1e-8,
        high=1,
        step=1e-4,
        group="captions",
        only_with=("new_tokens", SOMETHING),
    )


def read_new_tokens(text: str, vectors_per_token: int) -> dict[str, str]:
    """`"ohwx=cat, zwx"` as the word that each new token starts from, empty for a random start.

    Raises ValueError for a name that is none, for one given twice and for more vectors than a prompt holds.
    """
    tokens: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, start = (part.strip() for part in entry.partition("="))
        if not _NAME.fullmatch(name):
            raise ValueError(f"new_tokens names {name!r}: take letters, digits, - and _ as in 'ohwx' or 'ohwx=cat'")
        if name.lower() in map(str.lower, tokens):
            raise ValueError(f"new_tokens names {name} twice: each token is learned once")
        tokens[name] = start
    if len(tokens) * vectors_per_token > CHUNK_TOKENS:
        raise ValueError(
            f"new_tokens has {len(tokens)} words and vectors_per_token is {vectors_per_token}: a prompt holds "
            f"{CHUNK_TOKENS} tokens, so lower vectors_per_token"
        )
    return tokens


def tokens_of(settings: CaptionSettings) -> dict[str, str]:
    """The new tokens of a run, and what each starts from."""
    return read_new_tokens(settings.new_tokens, settings.vectors_per_token)


def placeholder_ids(settings: CaptionSettings) -> TokenIds:
    """Ids beyond any vocabulary, to count with before the encoders are there."""
    return dict.fromkeys(tokens_of(settings), [2**31 - 1] * settings.vectors_per_token)


def check_captions(settings: CaptionSettings) -> None:
    if not settings.tag_separator:
        raise ValueError("tag_separator is empty: give what stands between two tags, a comma for example")
    if settings.keep_tags and not (settings.shuffle_tags or settings.tag_dropout):
        raise ValueError(
            f"keep_tags is {settings.keep_tags} and shuffle_tags is off, tag_dropout 0: all tags stay as they are, so "
            "turn one of them on or set keep_tags to 0"
        )
    for option in ("caption_variants", "tag_separator"):
        is_set = getattr(settings, option) != fields_of(settings)[option].default
        if is_set and not (settings.shuffle_tags or settings.tag_dropout):
            raise ValueError(
                f"{option} is {getattr(settings, option)!r} and shuffle_tags is off, tag_dropout 0: captions stay "
                f"whole, so turn one of them on, or set {option} back"
            )
    if settings.class_images and not settings.class_prompt:
        raise ValueError(
            f"class_images is {settings.class_images} and class_prompt is empty: say what they show, or set it to 0"
        )
