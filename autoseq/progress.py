"""The lines that a user sees while a model compiles: one before, one after, and a sign of life where it takes long.

    autoseq: compiling GPT for 2 ranks with inductor; its first step waits for that
    autoseq: still compiling GPT after 30 s: inductor, backward (1 program so far)
    autoseq: GPT on 2 ranks, 128 of 256 rows each, ring, zigzag, no fallbacks; compiled in 34 s, of which autoseq 4

A model has these two lines however many parts Dynamo traces it in: the second comes when its first backward ends, or, where nothing
wants a gradient, when it is compiled or called again. What is compiled later, for another length or mode, is silent unless it takes long.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx
from torch.autograd import Variable

from autoseq import notices
from autoseq.compiled_model import Compiled, CompiledModel, model_being_compiled
from autoseq.dynamo_stack import compilation_began_s
from autoseq.options import Options
from autoseq.planning.topology import Topology
from autoseq.program import Program
from autoseq.readable import readable_bytes
from autoseq.runtime.groups import SequenceGroup, speaks_for_all
from autoseq.runtime.layout import local_length

FIRST_SIGN_S = 30.0
"""Of compiling, altogether, until there is a sign of life; the next comes when it has been twice as long."""

REWRITES, WAITS = "autoseq rewrites the program", "waiting for the other ranks"


class Progress:
    """How far the compilation of one model has come, and what has been said of it; a rank for which another one speaks is silent."""

    def __init__(self, model: CompiledModel, group: SequenceGroup, inner: str, *, speaks: bool) -> None:
        self._model, self._name = weakref.ref(model), model.name
        self._ranks, self._inner, self._speaks = group.size, inner, speaks
        self._spent_s = self._own_s = 0.0
        self._next_sign_s = FIRST_SIGN_S
        self._stage, self._began_s = REWRITES, 0.0
        self._is_running = self._is_announced = self._is_settled = False

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """While one program is compiled; its backward may follow when it is first needed."""
        if not self._is_announced:
            self._is_announced = True
            self._say(f"compiling {self._name} for {_count(self._ranks, 'rank')} with {self._inner}; its first step waits for that")
        self._stage = REWRITES
        with self._timed(compilation_began_s()):
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the other ranks are waited for."""
        before, self._stage = self._stage, WAITS
        yield
        self._stage = before

    @contextlib.contextmanager
    def rewriting(self) -> Iterator[None]:
        """While autoseq works, whose share of the time is named."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._own_s += time.perf_counter() - began_s

    def of_compiler(self, compiler: Callable[..., Any]) -> Callable[..., Any]:
        """A compiler of forward and backward graphs whose time counts; the backward may be compiled long after the forward."""

        def compile_timed(*args: Any, **keywords: Any) -> Any:
            if self._is_running:
                self._stage = f"{self._inner}, forward"
                return compiler(*args, **keywords)
            self._stage = f"{self._inner}, backward"
            with self._timed(time.time()):
                return compiler(*args, **keywords)

        return compile_timed

    @contextlib.contextmanager
    def _timed(self, began_s: float) -> Iterator[None]:
        self._began_s, self._is_running = began_s, True
        try:
            with _Watch(self._sign) if self._speaks else contextlib.nullcontext() as watch:
                yield
        finally:
            took_s = time.time() - began_s
            self._spent_s, self._is_running = self._spent_s + took_s, False
        if watch is not None and watch.has_woken and self._is_settled:
            self._say(f"compiled in {_seconds(took_s)}")

    def _sign(self) -> float:
        """Gives a sign of life if one is due; the seconds until the next."""
        spent_s = self._spent_s + time.time() - self._began_s
        if spent_s < self._next_sign_s:
            return self._next_sign_s - spent_s
        what = f"compiling {self._name} again, for other inputs, for" if self._is_settled else f"still compiling {self._name} after"
        self._say(f"{what} {_seconds(spent_s)}: {self._stage} ({_count(len(self._programs()), 'program')} so far)")
        self._next_sign_s = 2 * spent_s
        return spent_s

    def add(self, program: Program, *, topology: Callable[[], Topology], is_part: bool) -> Compiled:
        """Note a program of the model, before it is compiled."""
        local = fx.Graph()
        local.output(local.graph_copy(program.gm.graph, {}))
        compiled = Compiled(program, local, self._ranks, topology, is_part)
        if (model := self._model()) is not None:
            model.programs.append(compiled)
        return compiled

    def called(self, compiled: Compiled, results: Sequence[object]) -> None:
        """After a call of a program: see whether the first step ends now, or when the backward does."""
        nodes = [x.grad_fn for x in results if isinstance(x, Tensor) and x.grad_fn is not None]
        if (model := self._model()) is not None:
            model.called(compiled, trains=bool(nodes))
        if self._is_settled:
            return
        for node in nodes if compiled.calls == 1 else ():
            node.register_prehook(self._in_backward)
        is_again = compiled.calls > 1 and compiled is self._programs()[0]
        if (is_again and not (nodes and compiled.is_part)) or not (nodes or compiled.is_part):
            self.settle()

    def _in_backward(self, _: object) -> None:
        if not self._is_settled:
            Variable._execution_engine.queue_callback(self.settle)

    def settle(self) -> None:
        """The first step has ended: say what the model has become, once."""
        if self._is_settled or not (programs := self._programs()):
            return
        self._is_settled = True
        spent = f"compiled in {_seconds(self._spent_s)}, of which autoseq {self._own_s:.0f}"
        self._spent_s, self._next_sign_s = 0.0, FIRST_SIGN_S
        self._say(f"{self._name} on {summary([each.program for each in programs], self._ranks)}; {spent}")

    def _programs(self) -> list[Compiled]:
        model = self._model()
        return [] if model is None else [each for each in model.programs if each.ranks == self._ranks]

    def _say(self, text: str) -> None:
        if self._speaks:
            notices.notice(text)


class _Watch:
    """A thread that sleeps while something is compiled, wakes when a sign of life is due, and is gone when the compiler is done."""

    def __init__(self, sign: Callable[[], float]) -> None:
        self._sign, self._is_done = sign, threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoseq progress", daemon=True)
        self.has_woken = False

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done.wait(self._sign()):
            self.has_woken = True


_progress: weakref.WeakKeyDictionary[CompiledModel, dict[tuple[str, int, str], Progress]] = weakref.WeakKeyDictionary()
"""By model, then by the group, its size and the inner compiler: a model may be compiled again for other ranks."""


def progress_of(group: SequenceGroup, options: Options) -> Progress:
    """That of the model which is being compiled; of all ranks that run it one speaks."""
    model, key = model_being_compiled(), (group.name, group.size, options.inner)
    of_model = _progress.setdefault(model, {})
    if key not in of_model:
        of_model[key] = Progress(model, group, options.inner, speaks=speaks_for_all(group, options.mesh))
    return of_model[key]


# What a model has become ----------------------------------------------------------------------------------------------


def summary(programs: Sequence[Program], ranks: int) -> str:
    """`2 ranks, 128 of 256 rows each, ring, zigzag, no fallbacks`, of all parts of a model together."""
    sites = [planned for program in programs for planned in program.plan.sites]
    parts = [_count(ranks, "rank")]
    if sites:
        length, layout = max((max(each.site.site.q_len, each.site.site.k_len), each.layout) for each in sites)
        parts.append(f"{local_length(length, ranks, layout):,} of {length:,} rows each" if ranks > 1 else f"all {length:,} rows")
        parts.append(counted_names([each.strategy for each in sites]))
        parts.append(" and ".join(dict.fromkeys(each.layout for each in sites)) if ranks > 1 else "")
    else:
        parts.append("nothing is split")
    if len(programs) > 1:
        parts.append(f"{len(programs)} programs")
    fallbacks = [each for program in programs for each in program.fallbacks]
    sent = sum(each.bytes_per_rank for each in fallbacks)
    parts.append(f"{_count(len(fallbacks), 'fallback')} ({readable_bytes(sent)} sent a rank)" if fallbacks else "no fallbacks")
    return ", ".join(filter(None, parts))


def counted_names(names: Sequence[str]) -> str:
    """`ring`, or `20 × halo and 4 × ring`."""
    counts = Counter(names)
    return names[0] if len(counts) == 1 else " and ".join(f"{count} × {name}" for name, count in counts.most_common())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 1 else "under a second"
