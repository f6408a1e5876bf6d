"""The boundary of every command: autoseq's errors become a message on stderr and an exit status."""

import contextlib
import logging
import sys
from collections.abc import Iterator

import typer

from autoseq.runtime.errors import AutoSeqError, OptionError, TargetError, TopologyError


@contextlib.contextmanager
def exit_codes(verbose: bool) -> Iterator[None]:
    """1 for a failure, 2 for misuse, and never a traceback unless `verbose`."""
    from autoseq.logs import log_to_stderr

    log_to_stderr(verbose=verbose)
    try:
        yield
    except AutoSeqError as error:
        if verbose:
            logging.getLogger("autoseq").debug("%s", getattr(error, "details", ""), exc_info=error)
        misuse = isinstance(error, (TargetError, OptionError, TopologyError))
        print(f"autoseq: error: {error}", file=sys.stderr)
        raise typer.Exit(2 if misuse else 1) from None
