"""The whole value of an output that is kept as shards: who sees its memory, and whether something wrote to it.

    h, v = part(x)                   # v is a view of h in the program: one memory on one device, two gathered values here
    h.mul_(2)                        # one device's v has the new values
    v.sum()                          # refused by name

A write through the tensor itself is known when it happens. What has the memory beside it (a view, an array) writes unseen: before it is
handed out the values are hashed for whoever watches, and compared when that asks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.fingerprint import hash_bits, same_hash


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that has the same memory on one device."""

    name: str
    is_written: Callable[[], bool]
    is_seen: Callable[[], bool]  # by something that would have to see a write to the other


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Watch:
    """Of one that asks whether the values were written to since: whether they were, or a hash of what they were."""

    is_written: bool = False
    before: Tensor | list[int] | None = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class WholeValue:
    """The value once it is gathered, in an object of its own, which knows no history."""

    name: str
    value: Tensor | None = None
    may_be_written: bool = False
    is_shared: bool = False  # with something that may write to it unseen
    is_taken: bool = False  # by a part that runs, whose views of it go again
    aliases: list[Alias] = field(default_factory=list)
    _watches: weakref.WeakSet[_Watch] = field(default_factory=weakref.WeakSet)

    def note_write(self) -> None:
        """Something wrote to it. Raises UnsupportedError if a tensor that lives would have to see that."""
        self.may_be_written = True
        for watch in self._watches:
            watch.is_written = True
        for alias in self.aliases:
            if alias.is_seen():
                raise _apart(written=self.name, other=alias.name)

    def note_shared(self) -> None:
        """The memory is about to be handed out. (A value that is not here yet will be gathered for that.)"""
        if self.is_taken:
            return
        self.is_shared = True
        for watch in self._watches:
            self._remember(watch)

    def watch(self) -> Callable[[], bool]:
        """Returns a function that says whether the values were written to since. Keeps no value alive; sends nothing."""
        watch, alive = _Watch(), weakref.ref(self)
        self._watches.add(watch)
        if self.is_shared:
            self._remember(watch)

        def is_written() -> bool:
            whole = alive()
            hashed = None if whole is None or whole.value is None or watch.before is None else hash_bits(whole.value)
            return watch.is_written or (hashed is not None and not same_hash(hashed, watch.before))

        return is_written

    def share_with(self, other: WholeValue) -> None:
        """On one device both have the same memory."""
        for mine, theirs in ((self, other), (other, self)):
            alive = weakref.ref(theirs)
            mine.aliases.append(Alias(theirs.name, theirs.watch(), lambda alive=alive: bool((whole := alive()) and whole.is_shared)))

    def share_with_plain(self, other: Tensor, name: str) -> None:
        """On one device a plain tensor, called `name`, has the same memory. What its `.data` writes is not seen."""
        alive, values, version = weakref.ref(other), other.detach(), version_of(other)  # the detached tensor counts the writes too
        self.aliases.append(Alias(name, lambda: version_of(values) != version, lambda: alive() is not None))

    def has_memory_of(self, result: object) -> bool:
        """Whether a plain tensor is a view of the value."""
        if type(result) is not Tensor or self.value is None:
            return False
        return result.untyped_storage()._cdata == self.value.untyped_storage()._cdata

    def check_aliases(self) -> None:
        """Raises UnsupportedError if an alias was written to, of which this value does not know."""
        for alias in self.aliases:
            if alias.is_written():
                raise _apart(written=alias.name, other=self.name)

    def _remember(self, watch: _Watch) -> None:
        if watch.before is None and self.value is not None:
            watch.before = hash_bits(self.value)


def version_of(x: Tensor) -> int:
    """How often autograd saw x written to; 0 for an inference tensor, which does not count."""
    return 0 if x.is_inference() else x._version


def _apart(written: str, other: str) -> UnsupportedError:
    return UnsupportedError(
        f"{written} was written to, and on one device {other} has the same memory. Between the parts of a split program each has its own. "
        "Write to a clone of it (y = y.clone()), or write where the graph is not broken in between."
    )
