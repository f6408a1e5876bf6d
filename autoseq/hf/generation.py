"""`generate` runs whole on each rank: its steps have one token each, and the ranks of a sequence draw alike from equal generators."""

from __future__ import annotations

import functools
from typing import Any

import torch

from autoseq.hf.replicas import shown


@functools.cache
def generate_unsplit() -> None:
    """Once a process: transformers' `generate` runs without compiled programs, in a process whose trainer or accelerator was attached.

    The class has it and not one model, so that a copy of a model and an adapter around one do alike.
    """
    from transformers import GenerationMixin

    plain = GenerationMixin.generate

    @functools.wraps(plain)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if shown() is None:
            return plain(self, *args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return plain(self, *args, **kwargs)

    GenerationMixin.generate = generate
