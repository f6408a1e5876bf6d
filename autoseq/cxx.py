"""The C++ compiler that Inductor needs for code on CPUs, looked for as Inductor itself does, and the cure where there is none."""

from collections.abc import Iterable

from torch import Tensor

from autoseq.runtime.errors import CompilerError

NAME = "C++ compiler"
CURE = (
    "install one (apt-get install g++), name one in the environment variable CXX before Python starts, or compile with "
    'options={"inner": "aot_eager"} or "eager", which need none'
)


def find_cxx() -> str | None:
    """The command that Inductor would call; it is called once, for its version."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):  # OSError: it is there and cannot be run
        return None


def why_not() -> str:
    """Which commands Inductor has tried."""
    from torch._inductor import config

    tried = config.cpp.cxx if isinstance(config.cpp.cxx, list | tuple) else [config.cpp.cxx]
    return f"{' and '.join(each for each in tried if each)} cannot be run; {CURE}"


def refuse_missing_cxx(inputs: Iterable[object]) -> None:
    """Raises CompilerError where a program on CPUs is to go through Inductor. Torch would say so in the middle of compiling."""
    on_cpu = any(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() > 0 for x in inputs)
    if on_cpu and find_cxx() is None:
        raise CompilerError(f'inner="inductor", the default, needs a C++ compiler for CPUs, and {why_not()}')
