"""What torch is told of views that Python takes of a deferred output, between the parts of a model: each is a tensor by itself.

Given such a view among the inputs of a part, torch takes the view again of a stand-in of the output, with its sizes and steps as new
symbols. Where lengths are symbolic too these stay in the shape of the input, although none of the part's inputs tells them: neither
guards nor the rewritten program could compute them. Described as no view, the input has a symbol for each of its own sizes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from torch._subclasses.meta_utils import MetaTensorDesc, MetaTensorDescriber

from autoseq.runtime.deferred import DeferredTensor


def describe_views_of_outputs() -> None:
    """Have Dynamo see them so; to be called once."""
    MetaTensorDescriber.describe_tensor = _without_base(MetaTensorDescriber.describe_tensor)  # type: ignore[method-assign]


def _without_base(describe: Callable[..., MetaTensorDesc[Any]]) -> Callable[..., MetaTensorDesc[Any]]:
    @wraps(describe)
    def describe_tensor(self: MetaTensorDescriber, t: Any, **keywords: Any) -> MetaTensorDesc[Any]:
        described = describe(self, t, **keywords)
        if described.base is None or described.base.type is not DeferredTensor or described.type is DeferredTensor:
            return described
        return replace(described, is_view=False, base=None, view_func=None, creation_meta=None)

    return describe_tensor
