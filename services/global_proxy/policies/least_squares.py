"""Least squares of three terms, online, for times that nobody can foretell.

Coefficients differ by orders of magnitude between a laptop and a rack, and they drift (other neighbours, other
prompts), so old samples are forgotten exponentially. Every sample is taken relative to what a prior expects, which
makes an error of 10 % weigh alike for short and long times. Where samples say nothing (as long as no prompt has
queued, what does a token ahead cost?), the fit keeps the prior's proportions, scaled to what was seen: ridge
regression towards the mean ratio. Outliers are clipped.
"""

import math
from collections.abc import Sequence

_MEMORY = 0.99  # what a sample weighs against the next: about a hundred samples count
_RIDGE = 0.05  # in samples: so little is needed to move away from the prior's proportions
_CLIP = 6.0  # a sample counts as no more than this many times the mean ratio
_NUM_EAGER = (
    32  # while samples weigh no more than so many, each is fitted at once, then every eighth: solving takes time
)
_SOLVE_EVERY = 8
_LEAST = 0.1  # of the prior's proportions: no coefficient is less, for what costs nothing would be overrun


class Fit:
    """y = theta . x of three terms, each coefficient above 0."""

    def __init__(self, prior: tuple[float, float, float]) -> None:
        self._prior = prior
        self.theta = prior
        self.num_samples = 0
        self._weight = 0.0  # of all samples
        self._mean = 1.0  # of y / what the prior expects
        # Sums over the samples of u u^T, u r and u. u: the share of each term in what the prior expects (so u0 + u1 +
        # u2 = 1); r: y / what the prior expects.
        self._uu = [0.0] * 6  # 00 01 02 11 12 22
        self._ur = [0.0] * 3
        self._u = [0.0] * 3

    def observe(self, x1: float, x2: float, y: float) -> None:
        """One sample; the first term is the constant 1. What is not a finite time above 0 is left out."""
        if not (0.0 < y < math.inf and 0.0 <= x1 < math.inf and 0.0 <= x2 < math.inf):
            return
        p0, p1, p2 = self._prior
        expected = p0 + p1 * x1 + p2 * x2
        u0, u1, u2 = p0 / expected, p1 * x1 / expected, p2 * x2 / expected
        ratio = y / expected
        if self.num_samples:
            ratio = min(ratio, _CLIP * self._mean)
        self.num_samples += 1
        self._weight = weight = self._weight * _MEMORY + 1.0
        self._mean += (ratio - self._mean) / weight
        uu, ur, u = self._uu, self._ur, self._u
        uu[0] = uu[0] * _MEMORY + u0 * u0
        uu[1] = uu[1] * _MEMORY + u0 * u1
        uu[2] = uu[2] * _MEMORY + u0 * u2
        uu[3] = uu[3] * _MEMORY + u1 * u1
        uu[4] = uu[4] * _MEMORY + u1 * u2
        uu[5] = uu[5] * _MEMORY + u2 * u2
        ur[0] = ur[0] * _MEMORY + u0 * ratio
        ur[1] = ur[1] * _MEMORY + u1 * ratio
        ur[2] = ur[2] * _MEMORY + u2 * ratio
        u[0] = u[0] * _MEMORY + u0
        u[1] = u[1] * _MEMORY + u1
        u[2] = u[2] * _MEMORY + u2
        if weight <= _NUM_EAGER or self.num_samples % _SOLVE_EVERY == 0:
            self._solve()

    def discount(self) -> None:
        """Let all samples so far weigh half as much."""
        self._weight *= 0.5
        for sums in (self._uu, self._ur, self._u):
            for i in range(len(sums)):
                sums[i] *= 0.5

    def _solve(self) -> None:
        """Ridge regression of the ratios on the shares, towards the mean ratio in each term, none below its least."""
        mean = self._mean
        right = [ur - mean * u for ur, u in zip(self._ur, self._u, strict=True)]
        free = [0, 1, 2]
        least = (_LEAST - 1.0) * mean
        change = [least] * 3  # a term that would be less is held there, and the rest solved again
        for _ in range(3):
            fixed = [i for i in range(3) if i not in free]
            target = [right[i] - sum(self._at(i, j) * change[j] for j in fixed) for i in free]
            solved = _solve_symmetric([[self._at(i, j) + _RIDGE * (i == j) for j in free] for i in free], target)
            too_low = [i for i, d in zip(free, solved, strict=True) if d < least]
            if not too_low:
                for i, d in zip(free, solved, strict=True):
                    change[i] = d
                break
            free = [i for i in free if i not in too_low]
        p0, p1, p2 = self._prior
        self.theta = (p0 * (mean + change[0]), p1 * (mean + change[1]), p2 * (mean + change[2]))

    def _at(self, row: int, column: int) -> float:
        low, high = (row, column) if row <= column else (column, row)
        return self._uu[high if low == 0 else low + high + 1]


def _solve_symmetric(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Gaussian elimination; the ridge on the diagonal makes pivoting needless."""
    size = len(matrix)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            for k in range(i, size + 1):
                rows[j][k] -= factor * rows[i][k]
    solved = [0.0] * size
    for i in reversed(range(size)):
        solved[i] = (rows[i][size] - sum(rows[i][k] * solved[k] for k in range(i + 1, size))) / rows[i][i]
    return solved
