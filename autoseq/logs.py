"""Where logs go when autoseq is a command: to stderr, and torch's own only when asked for."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

import torch


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now, not to what it was when logging was set up."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handler = _Stderr()
_handler.setFormatter(logging.Formatter("autoseq: %(levelname)s: %(message)s"))


def log_to_stderr(*, verbose: bool) -> None:
    """Show autoseq's warnings; with `verbose` all it logs, and torch's graph breaks and tracebacks.

    TORCH_LOGS has the last word on what it names.
    """
    logger, told = logging.getLogger("autoseq"), os.environ.get("TORCH_LOGS", "")
    if "autoseq" in told:
        return
    logger.addHandler(_handler)  # once: a handler is added to a logger no second time
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose and not told:
        torch._logging.set_logs(all=logging.CRITICAL)


@contextmanager
def without_repeats(told: set[str]) -> Iterator[None]:
    """No warning is shown twice here, and none of a kind in `told`; afterwards that has the kinds of this block too.

    For looks at one model from several sides, which find the same with other numbers.
    """
    before, shown = frozenset(told), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        kind = message if record.msg == "%s" else str(record.msg)
        repeated = kind in before or message in shown
        told.add(kind)
        shown.add(message)
        return not repeated

    with _warnings_that(is_new):
        yield


def without_warnings() -> AbstractContextManager[None]:
    """None are shown here: of a look that nobody asked for."""
    return _warnings_that(lambda _: False)


@contextmanager
def _warnings_that(count: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    logger = logging.getLogger("autoseq")

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or count(record)

    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)
