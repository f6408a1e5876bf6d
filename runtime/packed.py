"""Rows of keys and values on their way: packed into one flat buffer, so that they travel in one message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from autoseq.runtime import runs
from autoseq.runtime.blocks import Chunk
from autoseq.runtime.runs import Runs


def elements(like: Sequence[Tensor], rows: Runs) -> int:
    """How many elements some rows of such tensors have."""
    return runs.count(rows) * sum(x.shape[0] * x.shape[1] * x.shape[3] for x in like)


@dataclass(frozen=True, slots=True)
class Packed:
    """Some local rows of a participant's tensors [B,K,rows,D]: its keys and values, or their gradients.

    `flat` is the one buffer whose views the tensors are; None while they are still where the program has them.
    """

    tensors: tuple[Tensor, ...]
    rows: Runs
    flat: Tensor | None = None

    @classmethod
    def whole(cls, tensors: tuple[Tensor, ...]) -> Packed:
        """All rows, where the program has them."""
        return cls(tensors, ((0, tensors[0].shape[2]),))

    @classmethod
    def empty(cls, like: Sequence[Tensor], rows: Runs, dtype: torch.dtype | None = None, *, zero: bool = False) -> Packed:
        """Room for some rows of such tensors."""
        new = like[0].new_zeros if zero else like[0].new_empty
        return cls.of_flat(new(elements(like, rows), dtype=dtype or like[0].dtype), like, rows)

    @classmethod
    def of_flat(cls, flat: Tensor, like: Sequence[Tensor], rows: Runs) -> Packed:
        """What a flat buffer holds."""
        shapes = [(*x.shape[:2], runs.count(rows), x.shape[3]) for x in like]
        pieces = flat.split([prod(shape) for shape in shapes])
        return cls(tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)), rows, flat)

    @classmethod
    def split(cls, flat: Tensor, parts: Iterable[tuple[Sequence[Tensor], Runs]]) -> list[Packed]:
        """What lies one after the other from the beginning of a flat buffer on: tensors like some, and which rows of them."""
        found, place = [], 0
        for like, rows in parts:
            size = elements(like, rows)
            found.append(cls.of_flat(flat[place : place + size], like, rows))
            place += size
        return found

    def part(self, rows: Runs) -> Packed:
        """Some of these rows, packed: a copy, unless they are all there and packed already."""
        if rows == self.rows and self.flat is not None:
            return self
        part = Packed.empty(self.tensors, rows)
        for at, to, count in self._shared(part):
            for mine, theirs in zip(self.tensors, part.tensors, strict=True):
                theirs[:, :, to : to + count].copy_(mine[:, :, at : at + count])
        return part

    def message(self) -> Tensor:
        """The packed rows."""
        assert self.flat is not None
        return self.flat

    def add(self, other: Packed) -> None:
        """Add the rows that both hold."""
        for at, to, count in self._shared(other):
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine[:, :, at : at + count].add_(theirs[:, :, to : to + count])

    def put(self, other: Packed) -> None:
        """Take over the rows that both hold."""
        for at, to, count in self._shared(other):
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine[:, :, at : at + count].copy_(theirs[:, :, to : to + count])

    def chunks(self, held: Sequence[Chunk]) -> list[Chunk]:
        """These rows as attention computes with them, given the chunks of their holder."""
        return [
            (place, start + first - local, rows)
            for local, start, count in held
            for place, first, rows in runs.offsets(((local, count),), self.rows)
        ]

    def _shared(self, other: Packed) -> list[tuple[int, int, int]]:
        """(place here, place there, rows) of the rows that both hold."""
        both = runs.intersection(self.rows, other.rows)
        here, there = runs.offsets(both, self.rows), runs.offsets(both, other.rows)
        # Each run of `both` lies in one run of either side, so the two lists go together.
        return [(at, to, rows) for (at, _, rows), (to, _, _) in zip(here, there, strict=True)]
