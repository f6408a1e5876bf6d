"""autoseq as a function and as a decorator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from autoseq.backend import told_options
from autoseq.capture_hooks import install_capture_hooks
from autoseq.copies import compile_with_copies
from autoseq.runtime.errors import OptionError

if TYPE_CHECKING:
    from autoseq.model_report import Report

Model = TypeVar("Model", bound=nn.Module)


def parallelize(model: Model, **options: Any) -> Model:
    """Compile `model` in place so that its sequence is split over ranks; returns it, `state_dict` keys unchanged.

    `options` are those of `autoseq.Options`; a wrong one raises OptionError here, not at the first call. A topology that cannot be read on
    this rank only raises TopologyError here, once the others have come to their first call, which raises RankMismatchError.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"parallelize takes an nn.Module, not {type(model).__name__}; for a function use torch.compile")
    told_options(options)
    install_capture_hooks(model)
    compile_with_copies(model, options)
    return model


def report(model: Any) -> "Report":
    """What splitting a model's sequence brought, beside one device: a record that prints as a table, `as_dict()` for scripts.

    `model` is what was compiled with this backend, by any of the three ways, or wraps it; it has run a step. Raises ReportError before
    that. Sends nothing: one rank may ask.
    """
    from autoseq.model_report import report as report_on

    return report_on(model)


def sequence_parallel(*misplaced: object, **options: Any) -> Callable[[type[Model]], type[Model]]:
    """A class decorator: every instance of the `nn.Module` class is `parallelize`d when it has been made.

        @autoseq.sequence_parallel(strategy="ring")
        class Model(nn.Module): ...
    """
    if misplaced:
        raise OptionError("sequence_parallel takes options by name only; without any, write @autoseq.sequence_parallel()")
    told_options(options)

    def decorate(cls: type[Model]) -> type[Model]:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise OptionError("sequence_parallel decorates an nn.Module class")
        plain_init = cls.__init__

        def __init__(self: Model, *args: Any, **kwargs: Any) -> None:
            plain_init(self, *args, **kwargs)
            if type(self) is cls:  # a subclass is made whole by its own __init__, and may be decorated itself
                parallelize(self, **options)

        __init__.__wrapped__ = plain_init  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate
