"""Groups: how well scales and biases serve the groups of some rows; the inner loop of a search.

Rows lie side by side here, a vector of them at a time, so that nothing is summed across a vector.
The loops are compiled for this machine at their first use in the process, in about 0.3 s; few rows
take numpy's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from qcc.quant_schemes.packing import Array

LANES = 16
TINY = np.finfo(np.float32).tiny  # the reciprocal of less overflows
_COMPILING = threading.Lock()


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

    def _run(self, name: str, results: int, s: Array, b: Array) -> list[Array]:
        """Each result f32[n, groups], its columns contiguous, as those of `s` should be."""
        groups, _, width = self.w.shape
        with _COMPILING:
            kernel = _kernels()[name]
        given = np.zeros((2, groups, width), np.float32)
        given[0, :, : self.n], given[1, :, : self.n] = s.T, b.T
        out = np.empty((results, groups, width), np.float32)
        bounds = np.array([self.zero, self.top], np.float32)
        kernel(*map(_tensor, (self.w, self.h, given, bounds, out)))
        return [part[:, : self.n].T for part in out]


def _columns(numbers: Array) -> Array:
    """The same numbers [n, groups], whose columns are contiguous; numpy keeps that."""
    return np.ascontiguousarray(numbers.T).T


@cache
def _kernels() -> dict[str, Callable[..., None]]:
    import tvm

    made = {name: _kernel(name) for name in ("sums", "error")}
    codegen = tvm.target.codegen
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())})
    library = tvm.compile(tvm.IRModule(made), target=target)
    return {name: library[name] for name in made}


def _tensor(array: Array) -> Any:
    import tvm_ffi

    return tvm_ffi.from_dlpack(array, require_alignment=array.itemsize)


def _kernel(name: str) -> Any:
    """PrimFunc (w [groups, size, n], h [groups, size], s and b [2, groups, n], bounds, out).

    `bounds` are zero and top. `out` [.., groups, n] has the three of `Groups.sums` or the one of
    `Groups.error`. n is a multiple of LANES.
    """
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    def splat(value: float) -> Any:
        return T.broadcast(T.float32(value), LANES)

    def numbers(label: str, *shape: Any) -> Any:
        buffer = T.buffer([i64(x) if isinstance(x, int) else x for x in shape], "float32", align=4)
        return T.arg(label, buffer)

    vector, count = f"float32x{LANES}", 3 if name == "sums" else 1
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            groups, size, n = (tirx.Var(label, "int64") for label in ("groups", "size", "n"))
            w, h = numbers("w", groups, size, n), numbers("h", groups, size)
            given, bounds = numbers("given", 2, groups, n), numbers("bounds", 2)
            out = numbers("out", count, groups, n)
            zero, top = (T.bind(T.broadcast(bounds[which], LANES)) for which in (0, 1))
            with T.serial(i64(0), groups) as group, T.serial(i64(0), n // LANES) as block:
                rows = T.ramp(block * LANES, 1, LANES)
                s, b = (T.bind(given[which, group, rows]) for which in (0, 1))
                size_of = T.call_llvm_pure_intrin(vector, "llvm.fabs", s)
                usable = T.Select(size_of < splat(float(TINY)), splat(1.0), s)
                inverse = T.bind(splat(1.0) / usable)
                offset = T.bind(zero - b * inverse)
                sums = [T.alloc_buffer((LANES,), "float32", scope="local") for _ in range(count)]
                lanes = T.ramp(0, 1, LANES)
                for each in sums:
                    T.buffer_store(each, splat(0.0), [lanes])

                def add(which: int, value: Any) -> None:
                    T.buffer_store(sums[which], sums[which][lanes] + value, [lanes])

                with T.serial(i64(0), size) as j:
                    x, weight = T.bind(w[group, j, rows]), T.broadcast(h[group, j], LANES)
                    near = T.call_llvm_pure_intrin(vector, "llvm.rint", x * inverse + offset)
                    q = T.bind(T.min(T.max(near, splat(0.0)), top) - zero)
                    if name == "error":
                        e = T.bind(q * s + b - x)
                        add(0, e * e * weight)
                    else:
                        hq = T.bind(weight * q)
                        add(0, hq)
                        add(1, hq * q)
                        add(2, hq * x)
                for which, each in enumerate(sums):
                    T.buffer_store(out, each[lanes], [which, group, rows])
    return builder.get()
