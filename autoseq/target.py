"""TARGET: how the command line names a model.

    path/file.py:factory           a function in a file
    package.module:factory         a function in an importable module
    hf:path/to/config.json         a transformers configuration, or the folder that holds it; weights are drawn, not loaded

A factory is called with `batch` and `seq_len` and returns the model and the keyword arguments of one call:

    def factory(batch: int, seq_len: int) -> tuple[nn.Module, dict]:
        return Model(), {"input_ids": torch.randint(0, 256, (batch, seq_len))}
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from autoseq.runtime.errors import AutoSeqError, TargetError

Factory = Callable[..., tuple[nn.Module, dict[str, Any]]]
FORMS = "path/file.py:factory, package.module:factory, or hf:PATH to a transformers config.json"


@dataclass(frozen=True, slots=True)
class Target:
    """A TARGET that was found: its text, and the factory behind it."""

    text: str
    factory: Factory

    def make(self, *, batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
        """The model and the keyword arguments of one call. Raises TargetError for anything else."""
        try:
            made = self.factory(batch=batch, seq_len=seq_len)
        except AutoSeqError:
            raise
        except Exception as error:
            raise TargetError(f"TARGET {self.text!r} failed when called with batch={batch}, seq_len={seq_len}: {brief(error)}") from error
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], Mapping)):
            raise TargetError(f"TARGET {self.text!r} must return (model, kwargs), an nn.Module and a dict; it returned {_kind(made)}")
        return made[0], dict(made[1])


def load_target(text: str) -> Target:
    """Find what `text` names, without building a model. Raises TargetError, in one line, when there is no such thing."""
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise TargetError(f"TARGET {text!r} names nothing to run; it is {FORMS}")
    if text.startswith("hf:"):
        return Target(text, _transformers_factory(text, Path(text.removeprefix("hf:")).expanduser()))
    module = _module_of_file(text, Path(where).expanduser()) if where.endswith(".py") else _module(text, where)
    return Target(text, _factory(text, module, name))


_TORCH = str(Path(torch.__file__).parent)


def brief(error: BaseException) -> str:
    """An exception in one line; of one that Dynamo has wrapped, what it wraps, and the innermost line that is not torch's."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    wrapped = re.search(r": got (\w+\(.*\))$", text, re.M)
    _, _, frames = text.partition("from user code:")
    places = [place for place in re.findall(r'File "([^"]+)", line (\d+), in', frames) if not place[0].startswith(_TORCH)]
    where = " at {}:{}".format(*places[-1]) if places else ""
    return f"{type(error).__name__}{where}: {wrapped[1] if wrapped else lines[0]}"


def _kind(made: object) -> str:
    inner = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else ""
    return f"{type(made).__name__} {inner}".strip()


def _module(text: str, name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    return _imported(text, name, lambda: importlib.import_module(name))


def _module_of_file(text: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"TARGET {text!r}: there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a script may import its neighbours

    def load() -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"autoseq_target_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
        spec.loader.exec_module(module)
        return module

    return _imported(text, str(path), load)


def _imported(text: str, name: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:
        raise TargetError(f"TARGET {text!r}: importing {name} failed: {brief(error)}") from error


def _factory(text: str, module: ModuleType, name: str) -> Factory:
    factory: Any = getattr(module, name, None)
    if factory is None:
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"]
        raise TargetError(f"TARGET {text!r}: there is no {name!r} there; its functions are {', '.join(own) or '(none)'}")
    if not callable(factory):
        raise TargetError(f"TARGET {text!r}: {name!r} is a {type(factory).__name__}, not a function")
    try:
        inspect.signature(factory).bind(batch=1, seq_len=1)
    except TypeError as error:
        raise TargetError(f"TARGET {text!r}: {name!r} must take batch and seq_len: {error}") from error
    return cast(Factory, factory)


def _transformers_factory(text: str, path: Path) -> Factory:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TargetError(f"TARGET {text!r}: there is no {file}; hf: takes a local config.json or its folder, nothing is downloaded")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise TargetError(f"TARGET {text!r} needs transformers: pip install 'autoseq[demo]' ({brief(error)})") from error
    try:
        config = AutoConfig.from_pretrained(str(file))
    except Exception as error:
        raise TargetError(f"TARGET {text!r}: {file} is no transformers configuration: {brief(error)}") from error

    def factory(batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        ids = torch.randint(0, config.get_text_config().vocab_size, (batch, seq_len))
        return model.train(), {"input_ids": ids, "labels": ids.clone(), "use_cache": False}

    return factory
