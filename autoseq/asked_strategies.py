"""Which strategy was asked for each attention: one name for all of them, or patterns of their names, the first that matches counting.

    {"model.layers.5.*": "ring", "*": "halo"}       ring for what is in layer 5, halo for the rest

Patterns are those of `fnmatch`, and names those that `autoseq inspect` and `autoseq plan` print: paths of modules, the second call of a
module with `#2` behind it. What no pattern matches is chosen, as with "auto".
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from autoseq.runtime.errors import OptionError, did_you_mean
from autoseq.runtime.strategies import STRATEGIES

log = logging.getLogger("autoseq")

Pairs = tuple[tuple[str, str], ...]
Asked = str | Mapping[str, str] | Pairs
"""A strategy's name or "auto"; or patterns of attentions' names with the same. `Pairs` is what `Options` keeps, which can be hashed."""

CHOICES = ("auto", *STRATEGIES)
_EVERY = "*"
_SHOWN = 6

# Patterns that decided for an attention of any program: not a mistake where a later one has none for them.
_decided: set[tuple[Pairs, str]] = set()
# Options of which a part of a program has been looked at, and the level at which it was told which patterns do not count there.
_told: set[tuple[Pairs, int]] = set()


def asked_strategy(asked: Asked, name: str) -> str:
    """The strategy, or "auto", that is asked for the attention of that name."""
    if isinstance(asked, str):
        return asked
    return next((strategy for pattern, strategy in _pairs(asked) if fnmatchcase(name, pattern)), "auto")


def _pairs(asked: Mapping[str, str] | Pairs) -> Pairs:
    return tuple(asked.items()) if isinstance(asked, Mapping) else asked


def literal(name: str) -> str:
    """The pattern that matches this name and no other."""
    return re.sub(r"[*?[]", r"[\g<0>]", name)


# What the user gave ---------------------------------------------------------------------------------------------------


def read_asked(given: object) -> str | Pairs:
    """The option as it is kept. Raises OptionError for what is no strategy, and for a pattern that could never count."""
    if not isinstance(given, Mapping | tuple):
        _check_choice(given, "option 'strategy'", ", or a mapping from names of attentions to these")
        return str(given)
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    seen: list[str] = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise OptionError(f"option 'strategy' maps names of attentions, such as 'model.layers.5.*', to strategies; it has {pair!r}")
        pattern, strategy = pair
        _check_choice(strategy, f"option 'strategy' for {pattern!r}")
        taken = next((earlier for earlier in seen if earlier in (_EVERY, pattern)), None)
        if taken is not None:
            advice = "put '*' last" if taken == _EVERY else "leave one out"
            raise OptionError(f"option 'strategy': {pattern!r} never counts, because {taken!r} before it matches as much; {advice}")
        seen.append(pattern)
    return pairs


def _check_choice(given: object, what: str, besides: str = "") -> None:
    if not (isinstance(given, str) and given in CHOICES):
        names = ", ".join(map(repr, CHOICES))
        raise OptionError(f"{what} cannot be {given!r}{did_you_mean(given, CHOICES)}; it is one of {names}{besides}")


def parse_asked(text: str) -> str | Pairs:
    """What the command line says: a strategy, or `*.5.*=ring,*=halo`. Raises OptionError as `read_asked`."""
    if "=" not in text:
        return read_asked(text)
    pairs: list[tuple[str, str]] = []
    for part in text.split(","):
        pattern, _, strategy = (each.strip() for each in part.rpartition("="))
        if not pattern:
            raise OptionError(f"--strategy {text}: {part!r} is no PATTERN=STRATEGY; write, for example, '*.5.*=ring,*=halo'")
        pairs.append((pattern, strategy))
    return read_asked(tuple(pairs))


# What the program has -------------------------------------------------------------------------------------------------


def check_patterns(asked: Asked, names: Sequence[str], *, of_part: bool, level: int = logging.WARNING) -> None:
    """Whether each pattern but `*` decides for an attention of a program. Raises OptionError, with the names there are, if one does not.

    A pattern that decided in an earlier program may have nothing to decide in a later one: a model that sees no image this time.
    Of a program that Dynamo traces in several parts each part is compiled by itself and sees its own attentions only, so there a pattern
    may belong to a part that comes later: it is told at `level`, once in a process for all parts, and not where an earlier part had it.
    """
    if isinstance(asked, str):
        return
    pairs = _pairs(asked)
    patterns = [pattern for pattern, _ in pairs]
    deciding = {next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None) for name in names}
    _decided.update((pairs, pattern) for pattern in deciding if pattern is not None)
    idle = [pattern for pattern in patterns if pattern != _EVERY and (pairs, pattern) not in _decided]
    if idle and not of_part:
        raise OptionError(f"option 'strategy': {_why_idle(idle[0], names)}")
    if of_part and idle and (pairs, level) not in _told:
        log.log(
            level, "option 'strategy': the part of the program with %s has no attention for %s, which counts only if another part has one; "
            "autoseq inspect looks at all parts", _listed(names), _listed(idle),
        )  # fmt: skip
    if of_part:
        _told.add((pairs, level))


def _why_idle(pattern: str, names: Sequence[str]) -> str:
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if matched:
        return f"{pattern!r} never counts, because patterns before it match all of its attentions ({_listed(matched)}); put it first"
    escaped = f" (this name is written {literal(pattern)!r}: keys are patterns)" if pattern in names else did_you_mean(pattern, names)
    return f"no attention matches {pattern!r}{escaped}; there are {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


# What a plan says -----------------------------------------------------------------------------------------------------


def as_patterns(strategies: Mapping[str, str]) -> dict[str, str]:
    """The patterns that ask for exactly these strategies, by name: the most frequent one for all that no other pattern matches.

    A strategy's attentions have one pattern together, `vision.*.attn`, where that matches them and no others; else one each.
    """
    (common, _), *others = Counter(strategies.values()).most_common()
    found: dict[str, str] = {}
    for strategy, _ in others:
        mine = [name for name, taken in strategies.items() if taken == strategy]
        shared = _shared(mine)
        exact = [name for name in strategies if fnmatchcase(name, shared)] == mine
        found |= dict.fromkeys([shared] if exact else map(literal, mine), strategy)
    return {**found, _EVERY: common}


def _shared(names: Sequence[str]) -> str:
    """What names begin and end with, module by module, and `*` between; of one name, itself."""
    if len(names) == 1:
        return literal(names[0])
    paths = [name.split(".") for name in names]
    first, last = _alike(paths), _alike([path[::-1] for path in paths])[::-1]
    return ".".join([*map(literal, first), "*", *map(literal, last)])


def _alike(paths: Sequence[Sequence[str]]) -> list[str]:
    """What all paths begin with."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
