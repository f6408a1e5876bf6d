"""accelerate's `find_executable_batch_size` in a loop of the user's own: refused by name.

It runs a function again with a smaller batch where that runs out of memory. One rank of a sequence would do so alone, and the others wait
for it in a message. (`auto_find_batch_size` of a Trainer is served: `autoseq.hf.out_of_memory`.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist

from autoseq.call_stack import frames
from autoseq.runtime.errors import UnsupportedError


def refuse_retries() -> None:
    """Raises UnsupportedError within a function that accelerate runs again on one rank; a single rank may do that."""
    if dist.get_world_size() > 1 and _is_retried():
        raise UnsupportedError(
            "autoseq.hf.attach does not serve find_executable_batch_size around a loop of your own: where one rank runs out of memory, it "
            "alone would try again with a smaller batch, while the others wait for it. Choose a batch size, or use a Trainer with "
            "auto_find_batch_size=True, whose ranks try again together."
        )


def refuse_retries_in(target: Any, *methods: str) -> None:
    """Have these methods of an object refuse them, as `attach` may have come before."""
    for name in methods:
        setattr(target, name, _refusing(getattr(target, name)))


def _refusing(plain: Any) -> Any:
    @functools.wraps(plain)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        refuse_retries()
        return plain(*args, **kwargs)

    return refusing


def _is_retried() -> bool:
    """Whether the function that the decorator makes is on the stack."""
    return any(each.f_code.co_name == "decorator" and each.f_globals.get("__name__") == "accelerate.utils.memory" for each in frames())
