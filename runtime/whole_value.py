"""The whole value of an output that is kept as shards, and the tensors that share its memory on one device.

    h, v = part(x)                   # v is a view of h in the program: one memory on one device, two gathered values here
    h.mul_(2)                        # one device's v has the new values
    v.sum()                          # refused by name
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from autoseq.runtime.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that has the same memory on one device."""

    name: str
    is_written: Callable[[], bool]
    is_seen: Callable[[], bool]  # by something that would have to see a write to the other


@dataclass(eq=False, slots=True)
class WholeValue:
    """The value once it is gathered, in an object of its own, which knows no history."""

    name: str
    value: Tensor | None = None
    is_written: bool = False  # perhaps, through the tensor or an alias with a version of its own
    is_shared: bool = False  # with a plain tensor, a view
    aliases: list[Alias] = field(default_factory=list)

    def note_write(self) -> None:
        """Something wrote to it. Raises UnsupportedError if a plain tensor would have to see that."""
        self.is_written = True
        for alias in self.aliases:
            if alias.is_seen():
                raise _apart(written=self.name, other=alias.name)

    def check_aliases(self) -> None:
        """Raises UnsupportedError if an alias was written to, of which this value does not know."""
        for alias in self.aliases:
            if alias.is_written():
                raise _apart(written=alias.name, other=self.name)


def _apart(written: str, other: str) -> UnsupportedError:
    return UnsupportedError(
        f"{written} was written to, and on one device {other} has the same memory. Between the parts of a split program each has its own. "
        "Write to a clone of it (y = y.clone()), or write where the graph is not broken in between."
    )
