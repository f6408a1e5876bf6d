"""Formulas: the value of a graph's tensor at an index, by symbolic interpretation of its making."""

from autoseq.passes.formula.reader import Known, NotAtItsIndex, Reader
from autoseq.passes.formula.values import SYMBOLS, Unreadable

__all__ = ["SYMBOLS", "Known", "NotAtItsIndex", "Reader", "Unreadable"]
