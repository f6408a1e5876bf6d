"""Where a node comes from in the user's model: the words every message and report uses."""

import os
import re

import torch
from torch import fx

_TORCH, _PASSES = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)\n\s*(?P<code>.*)')


def source_line(node: fx.Node) -> str:
    """`file.py:12 in forward: code` of the innermost frame that is not torch's own, or the node's name if tracing kept no frame."""
    frames = _frames(node)
    if not frames:
        return f"(no source line) {node.name}"
    innermost = next((frame for frame in reversed(frames) if not _in_torch(frame)), frames[-1])
    return line_of_code(innermost["file"], int(innermost["line"]), innermost["name"], innermost["code"])


def line_of_code(file: str, line: int, name: str, code: str) -> str:
    """`folder/file.py:12 in forward: code`."""
    return f"{'/'.join(file.split('/')[-2:])}:{line} in {name.strip()}: {code.strip()}"


def first_source(graph: fx.Graph) -> str:
    """Where the first operator comes from that tracing kept a frame of."""
    first = next((node for node in graph.nodes if node.op == "call_function" and _frames(node)), None)
    return source_line(first) if first is not None else "(no source)"


def has_source_line(node: fx.Node) -> bool:
    """Whether tracing kept a frame that is not torch's own."""
    return not all(_in_torch(frame) for frame in _frames(node))


def _frames(node: fx.Node) -> list[re.Match[str]]:
    """The model's and torch's; without those of the passes, which trace the model anew."""
    frames = _FRAME.finditer(node.meta.get("stack_trace") or "")
    return [frame for frame in frames if not frame["file"].startswith(_PASSES)]


def _in_torch(frame: re.Match[str]) -> bool:
    return frame["file"].startswith(_TORCH)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that ran `node`, such as `model.layers.0.self_attn`; the node's name without one."""
    stack = node.meta.get("nn_module_stack")
    return dotted(next(reversed(stack.values()))[0]) or node.name if stack else node.name


def input_name(placeholder: fx.Node) -> str:
    """What the user calls an input of Dynamo's graph: `input_ids`, or `model.norm.weight` for a parameter."""
    return dotted(_source_name(placeholder)) or str(placeholder.target)


def is_buffer(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a module's buffer, which is the same tensor at every call."""
    return re.search(r"\._buffers\['\w+'\]$", _source_name(placeholder)) is not None


def _source_name(placeholder: fx.Node) -> str:
    """Dynamo's expression for an input, "" for one that it did not make. (`name` is a method in older torch.)"""
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else source.name if isinstance(source.name, str) else source.name()


def dotted(path: str) -> str:
    """`L['self']._modules['layers']._modules['0']` as `layers.0`, and the first variable that a function closes over as `function.0`.

    Where Dynamo begins in a decorator's `wrapper(*args, **kwargs)`, the model is `L['args'][0]`.
    """
    path = re.sub(r"^L\['(self|fn|model|mod|kwargs)'\]|^L\['args'\]\[0\](?=\.)", "", path)
    path = re.sub(r"\._(modules|parameters|buffers)\[", "[", path)
    path = re.sub(r"L?\[(?:'([^']+)'|(\d+))\]", lambda m: "." + (m[1] or m[2]), path)
    path = re.sub(r"\.__closure__\.(\d+)\.cell_contents", r".\1", path)
    return re.sub(r"^___stack\d+\.", "", path.strip("."))
