"""The errors a user can cause, all under one base class.

Everything raised by `autoseq` on purpose is an `AutoSeqError`; anything else is a defect of ours. A message says what went
wrong, where (the model's own source line, when there is one) and how to fix it. The compile entry point adds the context
once, at the boundary, so code that raises these does not repeat it.
"""

import difflib
from collections.abc import Iterable


class AutoSeqError(Exception):
    """Base of every error that autoseq raises on purpose."""


class OptionError(AutoSeqError):
    """An option has an unknown name, a wrong type or a value out of range."""


class MeshError(AutoSeqError):
    """The device mesh or process group cannot carry a sequence group."""


class NoAttentionError(AutoSeqError):
    """A model has no attention that can be split, so there is nothing to plan, to draw or to inspect."""


class NoSequenceError(AutoSeqError):
    """A program has no sequence of which each rank could have rows of its own."""


class StrategyError(AutoSeqError):
    """The chosen strategy cannot serve an attention site."""


class FallbackError(AutoSeqError):
    """A step would have to be gathered and run whole, and `strict` forbids it."""


class RankMismatchError(AutoSeqError):
    """Ranks of one group compiled different programs, plans or inputs."""


class RendezvousError(AutoSeqError):
    """Some ranks of a group did not come to a meeting point in time."""


class MessageError(AutoSeqError):
    """A message between ranks was not delivered: a peer died, stalled, or left its process group."""


class ReportError(AutoSeqError):
    """There is nothing to report on: a model was not compiled with autoseq, or has not run yet."""


class TargetError(AutoSeqError):
    """The model, function or script named on the command line cannot be used."""


class TopologyError(AutoSeqError):
    """A description of the hardware is incomplete or wrong, is not found, or does not fit the number of ranks."""


class PlanError(AutoSeqError):
    """No plan serves what was asked for, or none fits."""


class NotSplitError(AutoSeqError):
    """A call of a compiled model ran whole, or would have, because Dynamo did not compile it."""


class CompilerError(AutoSeqError):
    """A compiler that the chosen `inner` needs is not there."""


class UnsupportedError(AutoSeqError):
    """The program uses a feature that autoseq cannot yet keep exact."""


class VerificationError(AutoSeqError):
    """A step whose sequence is split differs from the same step on one device."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """For the end of a message: the known name that comes closest to the one given, if any does."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
