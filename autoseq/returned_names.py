"""Names of what a module's forward returns, as its source says them: for `autoseq verify`, whose tables would else number outputs."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path


def named_tensors(returned: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each returned tensor by its path; one of a plain tuple by the name of the variable in `return logits, loss`, where that is sure."""
    names = _variables(model, len(returned)) if type(returned) is tuple else None
    for path, leaf in tree_flatten_with_path(returned)[0]:
        if isinstance(leaf, Tensor):
            name = re.sub(r"^\['?(\w+)'?\]$", r"\1", keystr(path)).strip(".") or "result"
            yield names[int(name)] if names and name.isdecimal() else name, leaf


def _variables(model: nn.Module, length: int) -> list[str] | None:
    """The names in forward's return statements, if they all return one tuple of `length` different variables."""
    try:
        forward = ast.parse(textwrap.dedent(inspect.getsource(type(model).forward))).body[0]
    except (OSError, TypeError, SyntaxError):  # written by a program, not in a file
        return None
    found = {_names(statement.value) for statement in _returns(forward)}
    names = found.pop() if len(found) == 1 else ()
    return list(names) if len(names) == length == len(set(names)) else None


def _returns(node: ast.AST) -> Iterator[ast.Return]:
    """Those of a function itself, not of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _returns(child)


def _names(value: ast.expr | None) -> tuple[str, ...]:
    elements = value.elts if isinstance(value, ast.Tuple) else []
    names = tuple(element.id for element in elements if isinstance(element, ast.Name))
    return names if len(names) == len(elements) else ()
