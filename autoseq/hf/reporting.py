"""What a trainer's logs say of the sequence: `autoseq/bytes_sent` and `autoseq/gathers`, beside every logged training loss.

The sequence's process group counts what rank 0 sends, where the trainer reports to anything (`report_to`).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from autoseq.mesh import TIMEOUT_S, TIMEOUT_VARIABLE
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.rendezvous import exchange, timeout_s

_COUNTED = "autoseq.runtime.counting"


def any_rank_reports(trainer: Any) -> bool:
    """Whether the mesh counts, on all ranks or none: a script may set `report_to` on its first rank alone, and groups are made together."""
    reports = bytes([bool(trainer.args.report_to)])
    answers = exchange(group_from_mesh(None), "hf: reports", reports, timeout_s=timeout_s(TIMEOUT_VARIABLE, TIMEOUT_S))
    return any(answer[0] for answer in answers)


def counting_backend() -> str:
    """The backend of torch.distributed whose groups count their messages."""
    return importlib.import_module(_COUNTED).BACKEND


def report_traffic(trainer: Any) -> None:
    """Add the bytes that this rank sent since the last logged loss, and the number of all-gathers among its messages.

    An all-gather makes a split value whole: an output that is read, a step that runs on gathered values, or keys under `gather_kv`.
    """
    counting, plain = importlib.import_module(_COUNTED), trainer.log
    before = counting.counters()

    @functools.wraps(plain)
    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        nonlocal before
        if "loss" in logs:
            now = counting.counters()
            gathers, size = _gathers(now) - _gathers(before), _bytes(now) - _bytes(before)
            logs, before = {**logs, "autoseq/bytes_sent": size, "autoseq/gathers": gathers}, now
        plain(logs, *args, **kwargs)

    trainer.log = log


def _gathers(counters: dict[str, tuple[int, int]]) -> int:
    return counters.get("all_gather", (0, 0))[0]


def _bytes(counters: dict[str, tuple[int, int]]) -> int:
    return sum(size for _, size in counters.values())
