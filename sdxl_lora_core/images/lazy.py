"""Sequences of images that are made when they are looked at, so that a thousand need the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """`count` items; item `i` is `make(i)`, called at every access."""

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        self._numbers, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Lazy[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Lazy[Item]:
        if isinstance(index, slice):
            numbers = self._numbers[index]
            return Lazy(len(numbers), lambda number: self._make(numbers[number]))
        return self._make(self._numbers[index])
