"""Norms and gated activations that are computed while they are rounded, against numpy f64."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import tvm

from qcc.quant_schemes.format import WeightFormat
from qcc.runtime.machine import enable_tiles
from qcc.targets.cpu.isa import AVX512_AMX
from qcc.targets.cpu.kernels import layout
from qcc.targets.cpu.kernels.activations import (
    HIGH,
    LOW,
    TILES,
    TILES_FROM,
    Activations,
    prepare,
)
from qcc.targets.cpu.kernels.linear import gated_gemm
from qcc.targets.cpu.kernels.row_sources import Gated, Normed, RowSource
from qcc.targets.cpu.passes.schedule import schedule_loops

from .linear_weights import PROCESSORS, lacks, q, stored, tensor

FORMAT = q(4, 32)
EPS = 1e-5
K = 100  # not a multiple of 32, of no vector
SOURCES: list[RowSource] = [Normed(K, EPS), Gated(K, "silu"), Gated(K, "gelu_tanh")]
CASES = [(name, source) for name in ("amx", "vnni", "avx2", "sse") for source in SOURCES]


def expected(source: RowSource, given: list[Any]) -> Any:
    """f64 rows."""
    x = given[0].astype("float64")
    if isinstance(source, Normed):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + source.eps) * given[1]
    gate, up = x[:, : source.k], x[:, source.k :]
    if source.activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner)) * up


def compiled(name: str, functions: dict[str, Any]) -> Any:
    if why := lacks(name):
        pytest.skip(why)
    target = tvm.target.Target(PROCESSORS[name][1])
    module = {key: func.with_attr("global_symbol", key) for key, func in functions.items()}
    with target:
        return tvm.compile(tvm.IRModule(module), target)


def empty(shape: Any, dtype: str) -> Any:
    """A tensor of junk at a multiple of 64 bytes."""
    made = tvm.runtime.empty([int(extent) for extent in shape], dtype)
    return made.copyfrom(np.full(made.shape, 3, dtype))


def bf16(words: Any) -> Any:
    """uint32 words -> f64, two numbers each, the low half first."""
    halves = words.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return halves.view("float32").astype("float64")


def rows_of_tiles(tiles: Any, m: int, k: int) -> Any:
    """f64[m, k] of tiles uint32[m / 16, groups, 256]."""
    numbers = bf16(tiles).reshape(len(tiles), -1, 16, 32).transpose(0, 2, 1, 3)
    return numbers.reshape(len(tiles) * 16, -1)[:m, :k]


@pytest.mark.parametrize(
    ("name", "source"), CASES, ids=lambda value: str(getattr(value, "activation", value))[:6]
)
def test_sources(name: str, source: RowSource) -> None:
    """In high precision as f32; in low as codes that stand for them; of many rows as tiles."""
    isa, random = PROCESSORS[name][0], np.random.default_rng(0)
    kind = Activations.of(FORMAT, K, False, isa) or Activations.none(K)
    lib = compiled(name, {"f": prepare(kind, None, isa, source, keeps=False)})
    for m in (1, 3, 21):
        given = [random.normal(size=(m, K)).astype("float32") * 3]
        if isinstance(source, Gated):
            given = [np.concatenate([*given, given[0][:, ::-1] + 1], axis=1)]
            given[0][0, :2] = -200, 200  # exp beyond f32
        else:
            given.append(random.normal(size=K).astype("float32"))
        want = expected(source, given)
        for mode in (HIGH, LOW, TILES):
            y = empty((m, K), "float32")
            made = [empty(shape, dtype) for _, shape, dtype in kind.parts(m)]
            args = [*map(tensor, given), tensor(np.array([mode], np.int32)), y, *made]
            lib["f"](*args)
            scale = np.abs(want).max(-1, keepdims=True)
            if mode == HIGH or kind.sums is None:
                assert (np.abs(y.numpy() - want) <= 1e-6 * scale).all(), (m, mode)
            elif mode == TILES and kind.tiles and m >= TILES_FROM:
                error = np.abs(rows_of_tiles(made[-1].numpy(), m, K) - want)
                assert (error <= np.abs(want) * 2**-8 + 1e-6 * scale).all(), m
            else:
                codes, scales = (part.numpy().astype("float64") for part in made[:2])
                step = np.repeat(scales, 32, axis=1)
                found = (codes * step)[:, :K]
                assert (np.abs(found - want) <= 0.501 * step[:, :K] + 1e-6 * scale).all(), m


INNER, OUTER, TOKENS = 64, 96, 37  # gated.k, k


@functools.cache
def gated_parts() -> tuple[Any, Any, list[Any]]:
    """(library, f64 weights, repacked parts) of a gated GEMM."""
    isa = AVX512_AMX
    kind = Activations.of(FORMAT, OUTER, False, isa)
    after = Activations.of(FORMAT, INNER, False, isa)
    assert kind is not None and after is not None
    functions = {
        "prepare": prepare(kind, None, isa),
        "gated": gated_gemm(FORMAT, OUTER, Gated(INNER, "silu"), after, isa),
    }
    count = len(FORMAT.stored(2 * INNER, OUTER))
    for part in range(count):
        func = layout.repack_func(FORMAT, 2 * INNER, OUTER, part, isa)
        functions[f"repack{part}"] = schedule_loops(func, isa)
    lib = compiled("amx", functions)
    parts, weights, _ = stored(FORMAT, 2 * INNER, OUTER)
    packed = []
    for i, (_, shape, dtype) in enumerate(layout.packed_parts(FORMAT, 2 * INNER, OUTER, isa)):
        packed.append(empty(shape, dtype))
        lib[f"repack{i}"](tensor(parts[i]), packed[-1])
    return lib, weights, packed


@pytest.mark.parametrize("mode", [HIGH, LOW, TILES])
@pytest.mark.parametrize("m", [TILES_FROM - 1, TOKENS])
def test_gated_gemm(mode: int, m: int) -> None:
    """act(gate) * up of a linear layer, as what follows takes it."""
    lib, weights, packed = gated_parts()
    if mode == TILES and not enable_tiles():
        pytest.skip("the system does not give tiles to this process")
    after = Activations.of(FORMAT, INNER, False, AVX512_AMX)
    kind = Activations.of(FORMAT, OUTER, False, AVX512_AMX)
    assert after is not None and kind is not None
    x = np.random.default_rng(m).normal(size=(m, OUTER)).astype("float32")
    chosen = tensor(np.array([mode], np.int32))
    prepared = [empty(shape, dtype) for _, shape, dtype in kind.parts(m)]
    lib["prepare"](tensor(x), chosen, *prepared)
    both, y = empty((m, 2 * INNER), "float32"), empty((m, INNER), "float32")
    made = [empty(shape, dtype) for _, shape, dtype in after.parts(m)]
    lib["gated"](tensor(x), *prepared, chosen, *packed, both, y, *made)
    want = expected(Gated(INNER, "silu"), [(x.astype("float64") @ weights.T)])
    scale = np.abs(want).max()
    if mode == HIGH:
        np.testing.assert_allclose(y.numpy(), want, rtol=0, atol=1e-5 * scale)
    elif mode == TILES and m >= TILES_FROM:
        found = rows_of_tiles(made[-1].numpy(), m, INNER)
        # bf16 rounds x, the weights and the result: 2^-9 of each, of sums of 96 products.
        np.testing.assert_allclose(found, want, rtol=0, atol=0.02 * scale)
        assert np.abs(found - want).mean() < 0.002 * scale
    else:
        codes, scales = (part.numpy().astype("float64") for part in made[:2])
        found = codes * np.repeat(scales, 32, axis=1)
        np.testing.assert_allclose(found, want, rtol=0, atol=0.03 * scale)
        assert np.abs(found - want).mean() < 0.006 * scale


def test_a_format_without_codes_is_prepared_as_tiles_only() -> None:
    kind = Activations.of(WeightFormat(16, "bfloat16"), K, False, AVX512_AMX)
    assert kind is not None and [name for name, _, _ in kind.parts(16)] == ["tiles"]
    assert Activations.of(WeightFormat(32, "float32"), K, False, AVX512_AMX) is None
