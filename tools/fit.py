"""The growth of a cost with n: the exponent of n to which the cost of n operations is proportional. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

FROM = 100
"""Costs at a smaller n are ignored: there, the constant part of an operation outweighs the rest."""


def exponent_of(costs: Mapping[int, float]) -> float | None:
    """Return the exponent of the total cost of n operations, given the cost of one operation at each n: 1 is linear.

    The exponent is the slope of the line of least squares through the logarithms, from n = `FROM` on, or of the two
    largest n if these are smaller. An exponent of 1.15 means that an operation among 10,000 costs twice as much as
    among 100. Returns None for less than two points.
    """
    largest = sorted(costs)[-2:]
    points = [(math.log(n), math.log(n * cost)) for n, cost in costs.items() if n >= FROM or n in largest]
    if len(points) < 2:
        return None
    middle = sum(x for x, _ in points) / len(points)
    level = sum(y for _, y in points) / len(points)
    return sum((x - middle) * (y - level) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
