"""Python between the parts of a model that reads a part's output: the gather is reported once a source line, an error under `strict`.

    y = self.attend(x)          # a part
    y = Kernel.apply(y)         # Dynamo does not trace this line, for which y is gathered
    return self.head(y)         # another part; its input is whole, so it gathers nothing

An output that is read after the model has returned is gathered too. That is what deferred outputs are for, and it is not reported.
"""

from __future__ import annotations

import linecache
import logging

from torch._guards import TracingContext

from autoseq.call_stack import frames
from autoseq.compiled_calls import is_in_a_call
from autoseq.options import Options
from autoseq.passes.shard import Fallback
from autoseq.passes.source import line_of_code
from autoseq.program import READS_BETWEEN, Program, report_fallback
from autoseq.runtime.groups import SequenceGroup
from autoseq.whole_program import NAMES_BREAKS


class ReadsBetweenParts:
    """Those of the outputs of one program; `level` is that of a report."""

    def __init__(self, program: Program, options: Options, group: SequenceGroup, *, level: int = logging.WARNING) -> None:
        self._program, self._options, self._group, self._level = program, options, group, level

    def note(self, output: str, sent_bytes: int) -> None:
        """An output is about to be gathered. Raises FallbackError under `strict` if the model's call still runs."""
        if not is_in_a_call() or TracingContext.try_get() is not None:  # a part that is traced reports its inputs itself
            return
        source = _reading_line()
        fallbacks = self._program.fallbacks
        if any(each.op == READS_BETWEEN and each.source == source for each in fallbacks):
            return
        reason = f"the program was traced in several parts, and this line between them reads {output}{NAMES_BREAKS}"
        found = Fallback(READS_BETWEEN, source, reason, sent_bytes)
        report_fallback(found, self._options, self._group, self._level)
        fallbacks.append(found)


def _reading_line() -> str:
    """Of the innermost frame that is neither torch's nor autoseq's."""
    frame = next((each for each in frames() if str(each.f_globals.get("__name__")).partition(".")[0] not in ("torch", "autoseq")), None)
    if frame is None:
        return "(no source line)"
    code = frame.f_code
    return line_of_code(code.co_filename, frame.f_lineno, code.co_name, linecache.getline(code.co_filename, frame.f_lineno))
