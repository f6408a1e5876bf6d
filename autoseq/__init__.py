"""autoseq: a `torch.compile` backend that splits a transformer's sequence over devices, with one device's numbers.

    model = torch.compile(model, backend="autoseq")

Every rank of a sequence group calls the model with the same, full-length inputs and gets the outputs and gradients of one
device. `parallelize` and `sequence_parallel` do the same as a function and as a class decorator.
"""

import torch

if torch.__version__ < (2, 11):
    raise ImportError(f"autoseq needs torch 2.11 or later; this is {torch.__version__}")

from autoseq import hf
from autoseq.api import parallelize, report, sequence_parallel
from autoseq.mesh import sequence_mesh
from autoseq.options import Options
from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.errors import (
    AutoSeqError,
    CompilerError,
    FallbackError,
    MeshError,
    MessageError,
    NoAttentionError,
    NoSequenceError,
    NotSplitError,
    OptionError,
    PlanError,
    RankMismatchError,
    RendezvousError,
    ReportError,
    StrategyError,
    TargetError,
    TopologyError,
    UnsupportedError,
    VerificationError,
)

__all__ = [
    "AutoSeqError", "CompilerError", "DeferredTensor", "FallbackError", "MeshError", "MessageError", "NoAttentionError", "NoSequenceError",
    "NotSplitError", "OptionError", "Options", "PlanError", "RankMismatchError", "RendezvousError", "ReportError", "StrategyError",
    "TargetError", "TopologyError", "UnsupportedError", "VerificationError", "hf", "parallelize", "report", "sequence_mesh",
    "sequence_parallel",
]  # fmt: skip
__version__ = "0.1.0"
