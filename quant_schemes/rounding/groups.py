"""Groups: how well scales and biases serve the groups of some rows; the inner loop of a search.

Rows lie side by side here, for the compiled loops of group_kernels.py; few rows take numpy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcc.quant_schemes.packing import Array
from qcc.quant_schemes.rounding.group_kernels import LANES, TINY, kernel


class Groups:
    """Weights w[n, groups, size] under importances h[1, groups, size], f32, as a grid rounds them.

    The code of w is q = round(w / s + zero - b / s), from 0 to `top`, and stands for (q - zero) * s
    + b. Scales and biases are f32[n, groups], and so is all that is computed of a group. Scales
    next to 0 count as 1.
    """

    def __init__(self, w: Array, h: Array, zero: int, top: int) -> None:
        """Turn the rows to columns."""
        self.n, self.zero, self.top = len(w), zero, top
        self.compiled = self.n >= LANES
        self.low, self.high = (_columns(x) for x in (w.min(axis=2), w.max(axis=2)))
        self.total, self.hw = h.sum(axis=2), _columns((h * w).sum(axis=2))
        self.h = np.ascontiguousarray(h[0])
        if not self.compiled:
            self.w = w
            return
        padded = np.zeros((*w.shape[1:], -(-self.n // LANES) * LANES), np.float32)
        padded[..., : self.n] = w.transpose(1, 2, 0)
        self.w = padded

    def sums(self, s: Array, b: Array) -> tuple[Array, Array, Array]:
        """Of every group the sums of h Q, h Q^2 and h Q w with Q = q - zero."""
        if self.compiled:
            found = self._run("sums", 3, s, b)
            return found[0], found[1], found[2]
        q = self._codes(s, b)
        hq = self.h * q
        return hq.sum(axis=2), (hq * q).sum(axis=2), (hq * self.w).sum(axis=2)

    def error(self, s: Array, b: Array) -> Array:
        """Of every group the sum of h times the squared error."""
        if self.compiled:
            return self._run("error", 1, s, b)[0]
        e = self._codes(s, b) * s[..., None] + b[..., None] - self.w
        total: Array = (e * e * self.h).sum(axis=2)
        return total

    def _codes(self, s: Array, b: Array) -> Array:
        """Q, f32[n, groups, size]."""
        inverse = 1 / np.where(np.abs(s) < TINY, 1, s)
        q = self.w * inverse[..., None] + (self.zero - b * inverse)[..., None]
        return np.clip(np.rint(q), 0, self.top) - np.float32(self.zero)

    def fit(self, grid: str, steps: Array) -> tuple[Array, Array]:
        """The scale and bias of least error of every group, where `compiled`.

        For each of `steps` f32[m] they begin at that share of the range, and are refitted to the
        codes that they give by least squares.

        Args:
            grid: SYMMETRIC (a step times the largest magnitude is a scale, the bias is 0), AFFINE,
                ONE_SIGN (biases are not above 0) or ZERO_POINT (whole numbers of scales).
            steps: see there; they may be negative on a symmetric grid.
        """
        assert self.compiled
        found = self._run(grid, 2, self.low, self.high, self.hw, extra=(self.total[0], steps))
        return found[0], found[1]

    def _run(
        self, name: str, results: int, *given: Array, extra: tuple[Array, ...] = ()
    ) -> list[Array]:
        """Each result f32[n, groups], its columns contiguous, as those of `given` should be."""
        groups, _, width = self.w.shape
        numbers = np.zeros((len(given), groups, width), np.float32)
        for own, each in zip(numbers, given, strict=True):
            own[:, : self.n] = each.T
        out = np.empty((results, groups, width), np.float32)
        bounds = np.array([self.zero, self.top], np.float32)
        kernel(name)(*map(_tensor, (self.w, self.h, numbers, bounds, *extra, out)))
        return [part[:, : self.n].T for part in out]


def _columns(numbers: Array) -> Array:
    """The same numbers [n, groups], whose columns are contiguous; numpy keeps that."""
    return np.ascontiguousarray(numbers.T).T


def _tensor(array: Array) -> Any:
    import tvm_ffi

    return tvm_ffi.from_dlpack(np.ascontiguousarray(array), require_alignment=array.itemsize)
