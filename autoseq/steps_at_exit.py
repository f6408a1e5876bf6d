"""The last comparison of a group is read when the group is destroyed or the process ends: nothing comes after it that would."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch.distributed as dist

from autoseq.runtime.errors import MessageError, RankMismatchError
from autoseq.step_check import StepCheck, checks_of

log = logging.getLogger("autoseq")

PATIENCE_S = 5.0
"""Seconds to wait for ranks whose message is not here yet; they end too, or have failed."""


@cache
def read_at_exit() -> None:
    """Have it read from now on."""
    dist.destroy_process_group = dist.distributed_c10d.destroy_process_group = _reading_first(dist.destroy_process_group)
    atexit.register(_end)


def _reading_first(destroy: Callable[..., None]) -> Callable[..., None]:
    @wraps(destroy)
    def destroy_process_group(group: Any = None) -> None:
        try:
            _read_last(checks_of(None if group is dist.group.WORLD else group))
        finally:
            destroy(group)

    return destroy_process_group


def _read_last(checks: Sequence[StepCheck]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    try:
        for check in checks:
            while not check.has_arrived() and time.monotonic() < deadline:
                time.sleep(0.001)
            if check.has_arrived():
                try:
                    check.read()
                except MessageError as error:  # the rank that failed says why
                    log.debug("the last comparison was not delivered: %s", error)
    finally:
        for check in checks:
            check.drop()


def _end() -> None:
    try:
        _read_last(checks_of(None))
    except RankMismatchError as error:
        # An exception in a handler at exit is printed, and the process ends with 0.
        log.critical("%s", error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
