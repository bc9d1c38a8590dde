"""softmax_rows: softmax of logits over their temperature, in two launches.

The first leaves each tile's maximum and its sum of exponentials, the second puts these together in
every workgroup: 12 bytes an element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import ROLE
from qcc.targets.gpu.kernels.tir import block, registers, shared, threads
from qcc.targets.gpu.limits import Limits
from qcc.targets.kernel import Arg, kernel

EACH = 8  # elements of a thread
GREEDY_TEMPERATURE = 1e-5  # and below: the largest logit alone, equal ones sharing
LEAST_EXPONENT = -87.0  # of a number that is not denormal; below it is exactly 0
LOWEST = 0xFF7FFFFF - (1 << 32)  # the bits of the lowest f32


def softmax_tiles(width: int, limits: Limits) -> int:
    """Tiles of a row: the workspace of softmax_rows is f32[b, 2 * tiles]."""
    return -(-width // (limits.max_threads * EACH))


@cache
def softmax_rows(role: str, width: int, limits: Limits) -> tirx.PrimFunc:
    """PrimFunc (logits f32[b, 1, width], temperature f32[b]) -> f32[b, 1, width], workspace."""
    b = tirx.Var("b", "int64")
    tiles = softmax_tiles(width, limits)
    args: list[Arg] = [
        ("logits", (b, 1, width), "float32"),
        ("temperature", (b,), "float32"),
        ("probs", (b, 1, width), "float32"),
        ("parts", (b, 2 * tiles), "float32"),
    ]
    work = _Softmax(b, width, tiles, limits.max_threads)
    return kernel("softmax", args, work.emit, {ROLE: role}, outputs=2)


@dataclass(frozen=True)
class _Softmax:
    rows: Any
    width: int
    tiles: int
    threads: int

    def emit(self, logits: Any, temperature: Any, probs: Any, parts: Any) -> None:
        self._summarize(logits, temperature, parts)
        self._normalize(logits, temperature, parts, probs)

    def _summarize(self, logits: Any, temperature: Any, parts: Any) -> None:
        with block(self.rows, "y") as row, block(self.tiles) as tile:
            with threads(self.threads) as thread:
                memory = shared((self.threads,), "float32")
                values, acc = registers(EACH), registers(1)
                T.buffer_store(acc, _lowest(), [0])
                with T.serial(0, EACH) as e:
                    column = T.bind((tile * EACH + e) * self.threads + thread)
                    T.buffer_store(values, _lowest(), [e])
                    with T.If(column < self.width), T.Then():
                        T.buffer_store(values, logits[row, 0, column], [e])
                        T.buffer_store(acc, T.max(acc[0], values[e]), [0])
                self._tree(memory, acc, thread, T.max)
                peak = T.bind(memory[0])
                T.buffer_store(acc, T.float32(0), [0])
                with T.serial(0, EACH) as e:
                    column = T.bind((tile * EACH + e) * self.threads + thread)
                    with T.If(column < self.width), T.Then():
                        value = _exp(values[e] - peak, temperature[row])
                        T.buffer_store(acc, acc[0] + value, [0])
                self._tree(memory, acc, thread, lambda a, b: a + b)
                with T.If(thread == 0), T.Then():
                    T.buffer_store(parts, peak, [row, tile])
                    T.buffer_store(parts, memory[0], [row, tile + self.tiles])

    def _normalize(self, logits: Any, temperature: Any, parts: Any, probs: Any) -> None:
        with block(self.rows, "y") as row, block(self.tiles) as tile:
            with threads(self.threads) as thread:
                memory = shared((self.threads,), "float32")
                acc = registers(1)
                T.buffer_store(acc, _lowest(), [0])
                with T.serial(0, -(-self.tiles // self.threads)) as step:
                    at = T.bind(step * self.threads + thread)
                    with T.If(at < self.tiles), T.Then():
                        T.buffer_store(acc, T.max(acc[0], parts[row, at]), [0])
                self._tree(memory, acc, thread, T.max)
                peak = T.bind(memory[0])
                T.buffer_store(acc, T.float32(0), [0])
                with T.serial(0, -(-self.tiles // self.threads)) as step:
                    at = T.bind(step * self.threads + thread)
                    with T.If(at < self.tiles), T.Then():
                        weight = _exp(parts[row, at] - peak, temperature[row])
                        T.buffer_store(acc, acc[0] + parts[row, at + self.tiles] * weight, [0])
                self._tree(memory, acc, thread, lambda a, b: a + b)
                # at least 1, or 0 where every logit is -inf: no token, no NaN
                total = T.bind(T.max(memory[0], T.float32(1)))
                with T.serial(0, EACH) as e:
                    column = T.bind((tile * EACH + e) * self.threads + thread)
                    with T.If(column < self.width), T.Then():
                        value = _exp(logits[row, 0, column] - peak, temperature[row])
                        T.buffer_store(probs, value / total, [row, 0, column])

    def _tree(self, memory: Any, acc: Any, thread: Any, pair: Callable[[Any, Any], Any]) -> None:
        """memory[0] = what `pair` makes of acc[0] of all threads."""
        _barrier()
        T.buffer_store(memory, acc[0], [thread])
        _barrier()
        with T.serial(0, self.threads.bit_length() - 1) as step:
            half = T.bind(T.shift_right(self.threads // 2, step))
            with T.If(thread < half), T.Then():
                T.buffer_store(memory, pair(memory[thread], memory[thread + half]), [thread])
            _barrier()


def _exp(difference: Any, temperature: Any) -> Any:
    """exp(difference / temperature) of a difference that is not above 0, bound to a name."""
    cold = temperature <= T.float32(GREEDY_TEMPERATURE)
    least = T.Select(cold, T.float32(0), temperature * T.float32(LEAST_EXPONENT))
    warm = T.max(temperature, T.float32(GREEDY_TEMPERATURE))
    gap = T.bind(difference)
    return T.bind(T.Select(gap < least, T.float32(0), T.exp(gap / warm)))


def _lowest() -> Any:
    return T.reinterpret("float32", T.int32(LOWEST))


def _barrier() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))
