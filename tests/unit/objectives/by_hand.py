"""References that are slow and obvious."""

import math

from torch import Tensor


def info_nce_by_hand(a: Tensor, b: Tensor, present: list[tuple[bool, bool]], groups: list[int]) -> float:
    """The definition, one logit at a time."""
    scale, paired = 1 / 0.07, [row for row, both in enumerate(present) if all(both)]
    total = 0.0
    for own, other, side in ((a, b, 1), (b, a, 0)):
        for row in paired:
            allowed = [c for c in range(len(groups)) if present[c][side] and (c == row or groups[c] != groups[row])]
            exponents = {c: math.exp(scale * float(own[row] @ other[c])) for c in allowed}
            total -= math.log(exponents[row] / sum(exponents.values())) / 2
    return total / len(paired)
