"""A folder to vote in: the images of a comparison in pairs, shown blind, and a file of votes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from filelock import FileLock

from ..files import (
    array_sha256,
    check_name,
    claim_name,
    flush_to_disk,
    json_sha256,
    safe_path,
    write_atomic,
    write_text_atomic,
)
from ..messages import shown
from .comparison import Comparison
from .saving import png_writer

OnImages = Callable[[int, int], object]
Choice = Literal["left", "right", "tie"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
LONGEST_RATER = 64  # letters
_BALLOT, _VOTES, _LOCK, _IMAGES = "ballot.json", "votes.jsonl", ".votes.lock", "images"
_VERSION = 1


class Pair(NamedTuple):
    """Two images of one prompt and seed: the numbers of cell and variants, as they are shown to a rater."""

    cell: int
    left: int
    right: int


@dataclass(frozen=True)
class Vote:
    """What a rater chose for a prompt and seed between the variants `left` and `right`, in words."""

    rater: str
    prompt: str
    seed: int
    left: str
    right: str
    choice: Choice
    time: str = ""


@dataclass(frozen=True)
class Ballot:
    """The images to vote on. `images` has for each variant the names of its images' files, None for a missing one.

    Neither the names nor the order of pairs and sides tell the variants: they depend on `secret`.
    """

    folder: Path
    variants: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: tuple[tuple[str | None, ...], ...]
    secret: str
    fingerprint: str

    @cached_property
    def pairs(self) -> list[tuple[int, int, int]]:
        """All pairs of variants (first < second) at all cells at which both have an image: cell, first, second."""
        cells, count = range(len(self.prompts) * len(self.seeds)), len(self.variants)
        return [
            (cell, first, second)
            for cell in cells
            for first in range(count)
            for second in range(first + 1, count)
            if self.images[first][cell] and self.images[second][cell]
        ]

    def pairs_for(self, rater: str) -> list[Pair]:
        """All pairs in the rater's own random order, with random sides."""
        drawn = sorted((self._hash(rater, number), number) for number in range(len(self.pairs)))
        return [self._sided(self.pairs[number], digest) for digest, number in drawn]

    def prompt_of(self, pair: Pair) -> str:
        return self.prompts[pair.cell // len(self.seeds)]

    def image(self, name: str) -> Path:
        """The file of an image. Raises FileNotFoundError for a name that is none of this ballot's."""
        if not any(name in own for own in self.images if name):
            raise FileNotFoundError(f"there is no image {shown(name)} in this vote")
        return self.folder / _IMAGES / f"{name}.png"

    def image_names(self, pair: Pair) -> tuple[str | None, str | None]:
        return self.images[pair.left][pair.cell], self.images[pair.right][pair.cell]

    def vote(self, rater: str, pair: Pair, choice: Choice) -> Vote:
        seed = self.seeds[pair.cell % len(self.seeds)]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Vote(rater, self.prompt_of(pair), seed, self.variants[pair.left], self.variants[pair.right], choice, now)

    def _hash(self, rater: str, number: int) -> str:
        return hashlib.sha256(f"{self.secret} {number} {rater}".encode()).hexdigest()

    @staticmethod
    def _sided(pair: tuple[int, int, int], digest: str) -> Pair:
        cell, *sides = pair
        return Pair(cell, *(sides if int(digest[-1], 16) % 2 else reversed(sides)))


def make_ballot(
    comparison: Comparison, root: Path, name: str, on_images: OnImages = lambda done, total: None
) -> Ballot:
    """The ballot of a comparison in `root/name`, or in the next free name if that has other images.

    A ballot of the same images is found again, with its votes. `on_images(done, total)` is called before each image is
    written, and may raise to cancel. Raises ValueError for a name that is no file name, for a
    single variant, and for variants that have no image in common.
    """
    check_name("save_as", name, ending="")
    if len(comparison.results) < 2:
        raise ValueError("the comparison has a single variant: compare at least two")
    hashes = [[cell and array_sha256(cell.pixels) for cell in result.cells] for result in comparison.results]
    names = [result.variant.name for result in comparison.results]
    fingerprint = json_sha256([names, comparison.prompts, comparison.seeds, hashes])

    def claim(candidate: str) -> Ballot | None:
        folder = safe_path(root, candidate)
        if not (folder / _BALLOT).exists():
            return _written(comparison, folder, fingerprint, on_images)
        found = read_ballot(root, candidate)
        return found if found.fingerprint == fingerprint else None

    ballot = claim_name(name, claim)
    if not ballot.pairs:
        raise ValueError("no two variants have an image of the same prompt and seed: compare them at the same ones")
    return ballot


def read_ballot(root: Path, name: str) -> Ballot:
    """The ballot in `root/name`. Raises FileNotFoundError if there is none, ValueError as safe_path does."""
    check_name("vote", name, ending="")
    folder = safe_path(root, name)
    try:
        values = json.loads((folder / _BALLOT).read_text(encoding="utf-8"))
        variants, prompts, seeds = (tuple(values[kind]) for kind in ("variants", "prompts", "seeds"))
        images, secret, fingerprint = (values[kind] for kind in ("images", "secret", "fingerprint"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no vote {shown(name)}: run Human Compare first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}/{_BALLOT} is damaged: run Human Compare with another save_as") from error
    return Ballot(folder, variants, prompts, seeds, tuple(map(tuple, images)), secret, fingerprint)


def _written(comparison: Comparison, folder: Path, fingerprint: str, on_images: OnImages) -> Ballot:
    """Writes the images, then the ballot, which makes the folder one to vote in."""
    shutil.rmtree(folder / _IMAGES, ignore_errors=True)  # of one that was cut off
    total = sum(cell is not None for result in comparison.results for cell in result.cells)
    done, secret = 0, secrets.token_hex(16)
    images: list[tuple[str | None, ...]] = []
    for number, result in enumerate(comparison.results):
        names: list[str | None] = []
        for place, cell in enumerate(result.cells):
            name = hashlib.sha256(f"{secret} {number} {place}".encode()).hexdigest()[:32] if cell else None
            if cell and name:
                on_images(done, total)
                done += 1
                write_atomic(folder / _IMAGES / f"{name}.png", png_writer(cell.pixels))
            names.append(name)
        images.append(tuple(names))
    variants = tuple(result.variant.name for result in comparison.results)
    ballot = Ballot(folder, variants, comparison.prompts, comparison.seeds, tuple(images), secret, fingerprint)
    values = {name: value for name, value in asdict(ballot).items() if name != "folder"}
    write_text_atomic(folder / _BALLOT, json.dumps({"version": _VERSION, **values}, ensure_ascii=False, indent=1))
    return ballot


def append_vote(ballot: Ballot, vote: Vote) -> None:
    """Appends a vote to votes.jsonl, and returns once it would survive a power failure. Raises OSError."""
    line = json.dumps(asdict(vote), ensure_ascii=False) + "\n"
    path = ballot.folder / _VOTES
    with FileLock(ballot.folder / _LOCK):
        with open(path, "a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"  # after one that was cut off
            file.write(line.encode())
        flush_to_disk(path)
        flush_to_disk(ballot.folder)


def read_votes(ballot: Ballot) -> list[Vote]:
    """The votes, of each rater the last one on a pair. Lines that are cut off or of other images are left out."""
    votes = {}
    for vote in _all_votes(ballot.folder / _VOTES):
        if {vote.left, vote.right} <= set(ballot.variants) and vote.prompt in ballot.prompts:
            votes[vote.rater, vote.prompt, vote.seed, frozenset((vote.left, vote.right))] = vote
    return list(votes.values())


def _all_votes(path: Path) -> Iterator[Vote]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            vote = Vote(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if vote.choice in CHOICES and vote.left != vote.right:
            yield vote


def unvoted(ballot: Ballot, rater: str, votes: Sequence[Vote]) -> list[int]:
    """The numbers of the rater's pairs that they have not voted on, in their order."""
    own = {(vote.prompt, vote.seed, frozenset((vote.left, vote.right))) for vote in votes if vote.rater == rater}

    def key(pair: Pair) -> tuple[str, int, frozenset[str]]:
        seed = ballot.seeds[pair.cell % len(ballot.seeds)]
        return ballot.prompt_of(pair), seed, frozenset((ballot.variants[pair.left], ballot.variants[pair.right]))

    return [number for number, pair in enumerate(ballot.pairs_for(rater)) if key(pair) not in own]


def require_rater(rater: Any) -> str:
    """Raises ValueError for anything that is no short name."""
    if not isinstance(rater, str) or not rater.strip() or len(rater) > LONGEST_RATER or not rater.isprintable():
        raise ValueError(f"rater is {shown(rater)}: give a name of 1 to {LONGEST_RATER} letters")
    return rater.strip()


def require_choice(choice: Any) -> Choice:
    for known in CHOICES:
        if choice == known:
            return known
    raise ValueError(f"choice is {shown(choice)}: give {', '.join(CHOICES)}")


def totals(votes: Sequence[Vote]) -> Mapping[str, int]:
    """The number of votes by rater."""
    return {rater: sum(vote.rater == rater for vote in votes) for rater in dict.fromkeys(vote.rater for vote in votes)}
