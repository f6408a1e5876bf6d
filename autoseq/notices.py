"""What autoseq says unasked, on stderr: one line before a model compiles, one after, and more only where that takes long.

A notice goes through the logger "autoseq" at a level between INFO and WARNING. Handlers that the user has configured get it; where there
are none, a handler of autoseq's own writes it, and warnings, to stderr. `AUTOSEQ_LOG=quiet`, or a level of the logger above `NOTICE`,
silences notices; warnings stay.
"""

import logging
import os
import sys
from typing import TextIO

from autoseq.runtime.errors import did_you_mean

VARIABLE = "AUTOSEQ_LOG"
NOTICE = 25
_KNOWN = ("", "notices", "quiet")

logging.addLevelName(NOTICE, "NOTICE")
log = logging.getLogger("autoseq")
_warned_of = set[str]()


def are_shown() -> bool:
    """Whether notices are to be said at all: not if `AUTOSEQ_LOG`, the logger's own level or `logging.disable` says otherwise."""
    return not (_is_quiet() or log.level > NOTICE or log.manager.disable >= NOTICE)


def notice(text: str) -> None:
    """Say one line."""
    if are_shown():
        # The effective level is WARNING unless the user has set one, so the record does not ask for it.
        log.handle(log.makeRecord(log.name, NOTICE, __file__, 0, text, (), None))


def _is_quiet() -> bool:
    asked = os.environ.get(VARIABLE, "")
    if asked not in _KNOWN and asked not in _warned_of:
        _warned_of.add(asked)
        log.warning("%s=%s is not known%s; it is quiet, or notices, the default", VARIABLE, asked, did_you_mean(asked, _KNOWN))
    return asked == "quiet"


class _ByDefault(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now, unless any other handler gets the record."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in log.handlers if handler is not self] or (log.propagate and log.parent and log.parent.handlers)
        if not others:
            self.stream = sys.stderr
            super().emit(record)


class _Plain(logging.Formatter):
    """`autoseq: text` for a notice, `autoseq: WARNING: text` for the rest."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == NOTICE else f"{record.levelname}: "
        return f"autoseq: {level}{super().format(record)}"


_handler = _ByDefault()
_handler.setFormatter(_Plain())


def show_by_default() -> None:
    """Have notices and warnings written where the user has configured no logging; to be called once."""
    log.addHandler(_handler)
