"""Which ranks a prediction asks: a pass ends with the slowest of them."""

# Of more ranks than these, only three are asked.
_MANY_RANKS = 16


def asked_ranks(P: int) -> list[int]:
    """All ranks, or of many the first, the last and one between; the last has work whenever anyone has."""
    return list(range(P)) if P <= _MANY_RANKS else [0, P // 2, P - 1]
