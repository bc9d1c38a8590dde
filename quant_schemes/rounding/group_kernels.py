"""The compiled loops of `Groups`: a vector of rows at a time, nothing is summed across a vector.

Each function takes w f32[groups, size, n] and h f32[groups, size], n a multiple of LANES.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

LANES = 16
TINY = np.finfo(np.float32).tiny  # the reciprocal of less overflows
SYMMETRIC, AFFINE, ONE_SIGN, ZERO_POINT = "symmetric", "affine", "one_sign", "zero_point"
_COMPILING = threading.Lock()


def kernel(name: str) -> Callable[..., None]:
    """A function by name, compiled for this machine at its first use, in about 0.2 s.

    sums        (w, h, (s, b) [2, groups, n], (zero, top) [2], out [3, groups, n])
    error       the same, out [1, groups, n]
    a grid      (w, h, (low, high, hw) [3, groups, n], (zero, top), total [groups], steps [m],
                out [2, groups, n]): see `Groups.fit`
    """
    with _COMPILING:
        return _compiled(name)


@cache
def _compiled(name: str) -> Callable[..., None]:
    import tvm

    func = _Loops().of_scales(name) if name in ("sums", "error") else _Loops().fit(name)
    mcpu = str(tvm.target.codegen.llvm_get_system_cpu())
    library = tvm.compile(
        tvm.IRModule({name: func}), tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    )
    found: Callable[..., None] = library[name]
    return found


class _Register:
    """A vector that changes."""

    def __init__(self, T: Any) -> None:
        self.T, self.buffer = T, T.alloc_buffer((LANES,), "float32", scope="local")
        self.lanes = T.ramp(0, 1, LANES)

    def get(self) -> Any:
        return self.buffer[self.lanes]

    def set(self, value: Any) -> None:
        self.T.buffer_store(self.buffer, value, [self.lanes])


class _Loops:
    """Builds one function."""

    def __init__(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        self.tirx, self.T = tirx, T

    def of_scales(self, name: str) -> Any:
        """PrimFunc: sums or error under given scales and biases."""
        T, count = self.T, 3 if name == "sums" else 1

        def body(group: Any, rows: Any, given: Any) -> list[Any]:
            s, b = (T.bind(given[which, group, rows]) for which in (0, 1))
            return self._walk(name, group, rows, s, b)

        return self._func(name, 2, count, False, body)

    def fit(self, grid: str) -> Any:
        """PrimFunc: the best scale and bias of each group on a grid."""
        T = self.T

        def body(group: Any, rows: Any, given: Any) -> list[Any]:
            low, high, hw = (T.bind(given[which, group, rows]) for which in (0, 1, 2))
            if grid in (ONE_SIGN, ZERO_POINT):
                low, high = T.bind(T.min(low, self._splat(0))), T.bind(T.max(high, self._splat(0)))
            best, scale, bias, s, b = (_Register(T) for _ in range(5))
            best.set(self._splat(float("inf")))
            for register in (scale, bias, b):
                register.set(self._splat(0))
            with self._serial(self.steps.shape[0]) as at:
                step = T.bind(T.broadcast(self.steps[at], LANES))
                if grid == SYMMETRIC:
                    s.set(step * T.max(T.max(low, -low), T.max(high, -high)))
                    _, sqq, swq = self._walk("sums", group, rows, s.get(), b.get())
                    s.set(swq / T.Select(sqq == self._splat(0), self._splat(1), sqq))
                else:
                    middle = T.bind((low + high) * self._splat(0.5))
                    s.set((high - low) * (step / self.top))
                    b.set(middle + (low - middle) * step)
                    for _ in range(2):
                        self._refit(grid, group, rows, hw, s, b)
                if grid == ZERO_POINT:
                    usable = T.Select(s.get() == self._splat(0), self._splat(1), s.get())
                    z = T.call_llvm_pure_intrin(self.vector, "llvm.rint", -b.get() / usable)
                    b.set(-T.min(T.max(z, self._splat(0)), self.top) * s.get())
                (error,) = self._walk("error", group, rows, s.get(), b.get())
                less = error < best.get()
                for kept, new in ((scale, s.get()), (bias, b.get()), (best, error)):
                    kept.set(T.Select(less, new, kept.get()))
            return [scale.get(), bias.get()]

        return self._func(grid, 3, 2, True, body)

    def _refit(self, grid: str, group: Any, rows: Any, hw: Any, s: Any, b: Any) -> None:
        """Scale and bias of least squares for the codes that they give."""
        T = self.T
        total = T.bind(T.broadcast(self.total[group], LANES))
        sq, sqq, swq = self._walk("sums", group, rows, s.get(), b.get())
        norm = T.bind(total * sqq - sq * sq)
        flat = norm <= total * sqq * self._splat(1e-6)
        fitted = (total * swq - sq * hw) / T.Select(flat, self._splat(1), norm)
        s.set(T.Select(flat, s.get(), fitted))
        b.set((hw - s.get() * sq) / total)
        if grid != AFFINE:
            alone = swq / T.max(sqq, self._splat(1e-30))  # without a bias
            s.set(T.Select(b.get() > self._splat(0), alone, s.get()))
            b.set(T.min(b.get(), self._splat(0)))

    def _walk(self, kind: str, group: Any, rows: Any, s: Any, b: Any) -> list[Any]:
        """Over a group's columns: the three sums, or the error, under s and b."""
        T = self.T
        s, b = T.bind(s), T.bind(b)
        size_of = T.call_llvm_pure_intrin(self.vector, "llvm.fabs", s)
        usable = T.Select(size_of < self._splat(float(TINY)), self._splat(1), s)
        inverse = T.bind(self._splat(1) / usable)
        offset = T.bind(self.zero - b * inverse)
        sums = [_Register(T) for _ in range(3 if kind == "sums" else 1)]
        for each in sums:
            each.set(self._splat(0))
        with self._serial(self.w.shape[1]) as j:
            x, weight = T.bind(self.w[group, j, rows]), T.broadcast(self.h[group, j], LANES)
            near = T.call_llvm_pure_intrin(self.vector, "llvm.rint", x * inverse + offset)
            q = T.bind(T.min(T.max(near, self._splat(0)), self.top) - self.zero)
            if kind == "error":
                e = T.bind(q * s + b - x)
                terms = [e * e * weight]
            else:
                hq = T.bind(weight * q)
                terms = [hq, hq * q, hq * x]
            for each, term in zip(sums, terms, strict=True):
                each.set(each.get() + term)
        return [T.bind(each.get()) for each in sums]

    def _func(self, name: str, given: int, results: int, fits: bool, body: Any) -> Any:
        """`body` (group, rows, given) -> results, for every group and vector of rows."""
        from tvm.script.ir_builder import IRBuilder

        T = self.T
        self.vector = f"float32x{LANES}"
        with IRBuilder() as builder:
            with T.prim_func():
                T.func_attr({"global_symbol": name, "tirx.noalias": True})
                names = ("groups", "size", "n", "m")
                groups, size, n, m = (self.tirx.Var(label, "int64") for label in names)
                self.w, self.h = self._arg("w", groups, size, n), self._arg("h", groups, size)
                numbers, bounds = self._arg("given", given, groups, n), self._arg("bounds", 2)
                if fits:
                    self.total, self.steps = self._arg("total", groups), self._arg("steps", m)
                out = self._arg("out", results, groups, n)
                self.zero, self.top = (
                    T.bind(T.broadcast(bounds[which], LANES)) for which in (0, 1)
                )
                with self._serial(groups) as group, self._serial(n // LANES) as block:
                    rows = T.ramp(block * LANES, 1, LANES)
                    for which, value in enumerate(body(group, rows, numbers)):
                        T.buffer_store(out, value, [which, group, rows])
        return builder.get()

    def _arg(self, label: str, *shape: Any) -> Any:
        extents = [self.tirx.IntImm("int64", x) if isinstance(x, int) else x for x in shape]
        return self.T.arg(label, self.T.buffer(extents, "float32", align=4))

    def _serial(self, stop: Any) -> Any:
        return self.T.serial(self.tirx.IntImm("int64", 0), stop)

    def _splat(self, value: float) -> Any:
        return self.T.broadcast(self.T.float32(value), LANES)
