"""Rotary embeddings on the CPU: the table, the split of q, k, v, and rotation in attention.

Pairs are (i, i + rotary_dim / 2); dimensions from rotary_dim on pass through. With full attention
q and k are rotated once, from a table. With a sliding window the cache stores k unrotated, and the
attention kernels rotate both by positions in the cache; `Rotation` emits that code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, kernel, rows_of, tensor
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention_storage import Storage, by_storage, emit_row
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig

_PARALLEL_TOKENS = 8  # fewer are not worth waking the threads


def rope_table(config: KVCacheConfig, max_lanes: int) -> Any:
    """inv_freq f32[r/2] -> table f32[max_positions, r]: first the cosines, then the sines.

    The angle is f32(position) * inv_freq in f32, as Hugging Face computes it; from there on exact.
    """
    half = config.rotary_dim // 2
    lanes = vx.lanes_dividing(half, max_lanes)
    with kernel("rope_table") as build:
        inv_freq = tensor("inv_freq", (half,), "float32")
        table = tensor("table", (config.max_positions, 2 * half), "float32")
        with build.body():
            flat = vx.flat(table, config.max_positions * 2 * half)
            with T.parallel(0, config.max_positions) as position:
                scalar = vx.keep(vx.cast(position, "float32", 1), 1)
                for i in range(0, half, lanes):
                    angle = vx.splat(scalar, lanes) * vx.load(inv_freq, i, lanes)
                    units = vx.cast(angle, "float64", lanes) * vx.splat(
                        tirx.FloatImm("float64", 2**32 / (2 * math.pi)), lanes
                    )
                    units = units + vx.splat(tirx.FloatImm("float64", 0.5), lanes)
                    turns = vx.cast(vx.cast(units, "int64", lanes), "uint32", lanes)
                    turns = vx.keep(turns, lanes, "uint32")
                    factor = vx.splat(float(config.rope_attention_factor), lanes)
                    for part, value in enumerate(vx.cos_sin(turns, lanes)):
                        base = position * (2 * half) + part * half + i
                        vx.store(flat, base, value * factor, lanes)
    return build.result()


def split_rotary(config: KVCacheConfig, max_lanes: int, with_table: bool) -> Any:
    """qkv [n, hq + 2 hkv, d], positions i32[n] -> q, k, v; rotated if there is a table.

    k and v are written as the cache stores them. The last argument is the table
    f32[max_positions, r], else the cache's flag apply_rope, unused.
    """
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    half = config.rotary_dim // 2 if with_table else 0
    fused = heads + 2 * kv_heads
    with kernel("split_rotary" if with_table else "split_qkv") as build:
        n, kv, width = T.int64(), T.int64(), T.int64()
        qkv = rows_of("qkv", n)
        positions = aux_buffer("positions", (n,))
        q = rows_of("q", n)
        outputs = [tensor(name, (n, kv, width), "float32") for name in ("k", "v")]
        if with_table:
            table = tensor("table", (config.max_positions, 2 * half), "float32")
        else:
            T.arg("apply_rope", T.int64())
        with build.body():
            words = T.bind(kv * width)
            source, queries = vx.flat(qkv, n * (fused * dim)), vx.flat(q, n * (heads * dim))
            flats = [vx.flat(buffer, n * words) for buffer in outputs]
            if with_table:
                angles = vx.flat(table, config.max_positions * 2 * half)

            def rotate(src: Any, start: Any, target: Any, dst: Any, turned: int) -> None:
                lanes = vx.lanes_dividing(turned, max_lanes)
                for j in range(0, turned, lanes):
                    cosine = vx.keep(vx.load(angles, start + j, lanes), lanes)
                    sine = vx.keep(vx.load(angles, start + half + j, lanes), lanes)
                    a = vx.keep(vx.load(source, src + j, lanes), lanes)
                    b = vx.keep(vx.load(source, src + half + j, lanes), lanes)
                    vx.store(target, dst + j, a * cosine - b * sine, lanes)
                    vx.store(target, dst + half + j, b * cosine + a * sine, lanes)
                lanes = vx.lanes_dividing(dim - 2 * turned, max_lanes)
                for j in range(2 * turned, dim, lanes):
                    vx.store(target, dst + j, vx.load(source, src + j, lanes), lanes)

            def token(i: Any) -> None:
                start = T.bind(vx.cast(positions[i], "int64", 1) * (2 * half)) if half else 0
                row = T.bind(i * (fused * dim))
                with T.serial(0, heads) as h:
                    rotate(row + h * dim, start, queries, T.bind((i * heads + h) * dim), half)
                scratch = T.alloc_buffer((dim,), "float32")
                # LLVM's optimizer makes an invalid module of reads wider than the writes before.
                lanes = vx.lanes_dividing(math.gcd(half, dim), max_lanes)
                for which, (target, turned) in enumerate(zip(flats, (half, 0), strict=True)):
                    first = heads + which * kv_heads
                    with T.serial(0, kv_heads) as h:
                        rotate(row + (first + h) * dim, start, scratch, 0, turned)

                        def keep(storage: Storage, target: Any = target, h: Any = h) -> None:
                            emit_row(config, storage, lanes, scratch, target, i, h)

                        by_storage(config, words, keep)

            vx.for_tokens(n, _PARALLEL_TOKENS, token)
    return build.result()


class Rotation:
    """Emits rotations by a position in the cache, its cosines computed on the spot.

    An angle is kept as a fraction of a turn in units of 2^-32: position * frequency is then an
    integer product that wraps, exact to one unit for positions below 2^16 (`low` has 16 more bits).
    """

    def __init__(self, config: KVCacheConfig, max_lanes: int) -> None:
        self.half = config.rotary_dim // 2
        self.dim = config.head_dim
        lanes = vx.lanes_dividing(self.half, max_lanes)
        # LLVM's optimizer makes an invalid module of pairs that are read again four at a time.
        self.lanes = 1 if lanes == 2 else lanes
        self.pass_lanes = vx.lanes_dividing(config.head_dim - 2 * self.half, max_lanes)
        self.scale = float(config.rope_attention_factor) ** 2  # of q and k, both applied to q
        inv_freq = np.array(config.inv_freq, np.float32).astype(np.float64).tolist()
        scaled = [round(math.modf(f / (2 * math.pi))[0] * 2**48) for f in inv_freq]
        self.high = [(f >> 16) & 0xFFFFFFFF for f in scaled]
        self.low = [f & 0xFFFF for f in scaled]

    def angle(self, position: Any, i: int) -> tuple[Any, Any]:
        """cos, sin of dimensions i .. i + lanes - 1 at an i32 position below 2^16."""
        p = vx.splat(vx.cast(position, "uint32", 1), self.lanes)
        high = vx.constants(self.high[i : i + self.lanes], "uint32")
        low = vx.constants(self.low[i : i + self.lanes], "uint32")
        sixteen = vx.splat(tirx.IntImm("uint32", 16), self.lanes)
        turns = vx.keep(p * high + T.shift_right(p * low, sixteen), self.lanes, "uint32")
        return vx.cos_sin(turns, self.lanes)

    def query(self, load: Any, position: Any, store: Any) -> None:
        """Rotate one query: load(d, lanes) reads it, store(d, value, lanes) takes the result."""
        scale = vx.splat(self.scale, self.lanes)
        for i in range(0, self.half, self.lanes):
            cosine, sine = self.angle(position, i)
            a = vx.keep(load(i, self.lanes) * scale, self.lanes)
            b = vx.keep(load(self.half + i, self.lanes) * scale, self.lanes)
            store(i, a * cosine - b * sine, self.lanes)
            store(self.half + i, b * cosine + a * sine, self.lanes)
        for i in range(2 * self.half, self.dim, self.pass_lanes):
            store(i, load(i, self.pass_lanes), self.pass_lanes)

    def prepare(self) -> None:
        """Once a task: the frequencies in memory, for `angles`."""
        if not self.half:
            return
        self.tables = [T.alloc_buffer((self.half,), "uint32") for _ in range(2)]
        for table, values in zip(self.tables, (self.high, self.low), strict=True):
            for i in range(0, self.half, self.lanes):
                constants = vx.constants(values[i : i + self.lanes], "uint32")
                T.buffer_store(table, constants, [vx.index(i, self.lanes)])

    def angles(self, turns: Any, count: Any, position: Any) -> None:
        """turns [count, r/2, 16] <- cos and sin of position, position + 1, ...

        Those of positions below 0 mean nothing.
        """
        wide = PAGE_SIZE
        if not self.half:
            return
        ramp = vx.constants(list(range(wide)), "int32")
        sixteen = vx.splat(tirx.IntImm("uint32", 16), wide)
        with T.serial(0, count) as p:
            places = vx.splat(position + p * wide, wide) + ramp
            places = vx.keep(vx.cast(places, "uint32", wide), wide, "uint32")
            with T.serial(0, self.half) as i:
                high, low = (vx.splat(vx.load(table, i, 1), wide) for table in self.tables)
                fraction = places * high + T.shift_right(places * low, sixteen)
                fraction = vx.keep(fraction, wide, "uint32")
                for table, value in zip(turns, vx.cos_sin(fraction, wide), strict=True):
                    vx.store(table, (p * self.half + i) * wide, value, wide)

    def panels(self, k: Any, turns: Any, count: Any) -> None:
        """Rotate panels of 16 keys [count, d, 16] in place by `turns`."""
        half, wide = self.half, PAGE_SIZE
        if not half:
            return
        with T.serial(0, count) as p:
            with T.serial(0, half) as i:
                at = T.bind((p * self.dim + i) * wide)
                cosine, sine = (T.bind(vx.load(t, (p * half + i) * wide, wide)) for t in turns)
                a = vx.keep(vx.load(k, at, wide), wide)
                b = vx.keep(vx.load(k, at + half * wide, wide), wide)
                vx.store(k, at, a * cosine - b * sine, wide)
                vx.store(k, at + half * wide, b * cosine + a * sine, wide)
