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


def group_info_nce_by_hand(a: Tensor, b: Tensor, present: list[tuple[bool, bool]], groups: list[int]) -> float:
    """Every row of one side against all rows of the other; the mean over those of its group, outside the logarithm."""
    scale, value = 1 / 0.07, 0.0
    for own, other, side in ((a, b, 1), (b, a, 0)):
        candidates = [c for c in range(len(groups)) if present[c][side]]
        losses = []
        for row in (row for row in range(len(groups)) if present[row][1 - side]):
            logits = {c: scale * float(own[row] @ other[c]) for c in candidates}
            right = [c for c in candidates if groups[c] == groups[row]]
            total = math.log(sum(map(math.exp, logits.values()))) if candidates else 0.0
            losses += [sum(total - logits[c] for c in right) / len(right)] if right else []
        value += sum(losses) / len(losses) / 2
    return value


def group_sigmoid_by_hand(a: Tensor, b: Tensor, present: list[tuple[bool, bool]], groups: list[int]) -> float:
    """All rows that have the one side against all that have the other, over the number of those with a right answer."""
    first, second = ([row for row, has in enumerate(present) if has[side]] for side in (0, 1))
    total = 0.0
    for row in first:
        for c in second:
            logit = 10 * float(a[row] @ b[c]) - 10
            total += math.log1p(math.exp(-logit if groups[row] == groups[c] else logit))
    return total / sum(any(groups[row] == groups[c] for c in second) for row in first)
