"""The CPU's kernels of experts against numpy f64; weights of experts that no pair uses are NaN."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tvm

from qcc.quant_schemes.format import WeightFormat, mxfp4
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels import layout
from qcc.targets.cpu.kernels.activations import HIGH, LOW, Activations, prepare
from qcc.targets.cpu.kernels.experts import FEW, expert_order, experts_gemm, experts_gemv
from qcc.targets.cpu.passes.schedule import schedule_loops

from .aarch64 import Emulated
from .linear_weights import PROCESSORS, RELATIVE, asymmetric, lacks, q, stored, tensor

# One of each way in which kernels read numbers: floats, scales, sums of x, codes of scales, words
# that lie transposed, one scale of all experts.
FORMATS = [
    WeightFormat(32, "float32"),
    WeightFormat(16, "bfloat16"),
    q(4, 32),
    q(3, 40, "bfloat16", "KN"),
    asymmetric(3, 32),
    q(4, 128, grid="zero_point"),
    asymmetric(2, 16, scale_bits=4),
    q(8, "tensor"),
    mxfp4("float16"),
]
EXPERTS, SLOTS = 7, 3
# (n, k, pairs that share a row of x): an expert's rows fill no vector; they fill panels. Columns
# fill no group or chunk.
SHAPES = [(77, 105, SLOTS), (128, 40, 1)]
CASES = [("vnni", fmt) for fmt in FORMATS] + [("avx2", fmt) for fmt in FORMATS[2::3]]
CASES += [("neon_dot", q(4, 32))]
IN_MODES = [(*case, HIGH) for case in CASES]
IN_MODES += [(*case, LOW) for case in CASES if not case[1].is_float]
IDS = [f"{p}-{f.bits}-{f.group}-{f.grid}-{'high' if m == HIGH else 'low'}" for p, f, m in IN_MODES]


@functools.cache
def built(processor: str, fmt: WeightFormat) -> Any:
    isa, description = PROCESSORS[processor]
    made: dict[str, Any] = {"order": expert_order(EXPERTS)}
    for n, k, each in SHAPES:
        kind = Activations.of(fmt, k, True, isa)
        if kind is not None:
            made[f"prepare_{n}"] = prepare(kind, None, isa)
        made[f"one_{n}"] = experts_gemv(fmt, EXPERTS, n, k, SLOTS // each, SLOTS, isa)
        made[f"many_{n}"] = experts_gemm(fmt, EXPERTS, n, k, each, isa)
        for part in range(len(fmt.stored(n, k))):
            func = layout.repack_func(fmt, n, k, part, isa, EXPERTS)
            made[f"repack_{n}_{part}"] = schedule_loops(func, isa)
    target = tvm.target.Target(description)
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in made.items()})
    with target:
        lib = tvm.compile(module, target)
    return Emulated(lib, f"experts_{processor}") if processor == "neon_dot" else lib


def poisoned(packed: list[Any], used: set[int]) -> list[Any]:
    """Repacked parts whose numbers are NaN in the blocks of all other experts."""
    found = []
    for part in packed:
        array = part.numpy()
        by_expert = array.reshape(EXPERTS, -1)
        nan = {"float32": np.nan, "float16": np.nan, "uint16": 0x7FC0}.get(array.dtype.name)
        for expert in set(range(EXPERTS)) - used:
            by_expert[expert] = np.iinfo(array.dtype).max if nan is None else nan
        found.append(tensor(array))
    return found


def choices(tokens: int, seed: int) -> Any:
    """int32[tokens, SLOTS], each row different experts; expert 2 is never used."""
    random = np.random.default_rng(seed)
    others = np.array([0, 1, 3, 4, 5, 6])
    # The first experts are those of most tokens: groups of one pair, of a few, and of many.
    odds = 0.4 ** np.arange(len(others))
    rows = [random.choice(others, SLOTS, False, odds / odds.sum()) for _ in range(tokens)]
    return np.array(rows, np.int32)


def starts_and_order(lib: Any, ids: Any) -> tuple[Any, Any]:
    starts, order = (tensor(np.full(d, -9, "int32")) for d in (EXPERTS + 1, ids.size))
    lib["order"](tensor(ids.reshape(-1)), starts, order)
    return starts, order


def prepared(lib: Any, fmt: WeightFormat, n: int, x: Any, mode: int, isa: Isa) -> list[Any]:
    """What the kernels take after x."""
    kind = Activations.of(fmt, x.shape[1], True, isa)
    if kind is None:
        return []
    made = [tensor(np.full(shape, 3, dtype)) for _, shape, dtype in kind.parts(len(x))]
    chosen = tensor(np.array([mode], np.int32))
    lib[f"prepare_{n}"](tensor(x), chosen, *made)
    return [*made, chosen]


@pytest.mark.parametrize(("processor", "fmt", "mode"), IN_MODES, ids=IDS)
def test_products_of_pairs(processor: str, fmt: WeightFormat, mode: int) -> None:
    if why := lacks(processor):
        pytest.skip(why)
    isa, _ = PROCESSORS[processor]
    lib, random = built(processor, fmt), np.random.default_rng(1)
    for n, k, each in SHAPES:
        parts, weights, bias = stored(fmt, EXPERTS * n, k)
        size = (np.abs(weights - bias) + np.abs(bias)).reshape(EXPERTS, n, k)
        by_expert = weights.reshape(EXPERTS, n, k)
        packed = []
        for i, (_, shape, dtype) in enumerate(layout.packed_parts(fmt, n, k, isa, EXPERTS)):
            packed.append(tvm.runtime.empty(shape, dtype))
            lib[f"repack_{n}_{i}"](tensor(parts[i]), packed[-1])
        counts: set[int] = set()
        for tokens in (1, 2, 5, 40):
            ids = choices(tokens, seed=tokens)
            chosen = ids.reshape(-1)
            counts |= {int(c) for c in np.bincount(chosen, minlength=EXPERTS)}
            in_use = poisoned(packed, {int(e) for e in chosen})
            x = random.normal(size=(ids.size // each, k)).astype("float32")
            given = prepared(lib, fmt, n, x, mode, isa)
            exact_x = x.astype("float64")
            if mode == LOW:
                # What codes stand for; how they are chosen is test_cpu_linear's business.
                codes, scales = (part.numpy().astype("float64") for part in given[:2])
                exact_x = (codes * np.repeat(scales, 32, axis=1))[:, :k]
            out = tensor(np.full((ids.size, n), np.nan, "float32"))
            if tokens == 1:
                lib[f"one_{n}"](tensor(x), *given, *in_use, tensor(chosen), out)
            else:
                lib[f"many_{n}"](tensor(x), *given, *in_use, *starts_and_order(lib, ids), out)
            of_pair = np.repeat(exact_x, each, axis=0)
            exact = np.einsum("pk,pnk->pn", of_pair, by_expert[chosen])
            bound = np.einsum("pk,pnk->pn", np.abs(of_pair), size[chosen])
            error = np.abs(out.numpy() - exact)
            assert (error <= RELATIVE * bound + 1e-12).all(), (n, tokens)
        few = set(range(1, FEW + 1))
        assert 0 in counts and counts & few and max(counts) > 2 * isa.tile_m, "as `choices` says"


@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_order_of_pairs(tokens: int) -> None:
    """Sorted by expert, within one by number; experts without pairs have none."""
    lib = built("avx2", FORMATS[2])
    for ids in (choices(tokens, 0), np.full((tokens, SLOTS), EXPERTS - 1, "int32")):
        starts, order = starts_and_order(lib, ids)
        flat = ids.reshape(-1)
        np.testing.assert_array_equal(order.numpy(), np.argsort(flat, kind="stable"))
        counts = np.bincount(flat, minlength=EXPERTS)
        np.testing.assert_array_equal(starts.numpy(), [0, *np.cumsum(counts)])


def test_padding_lies_behind_each_expert() -> None:
    """Rows of an expert begin a block and a panel: [experts * n', columns, L]."""
    isa, _ = PROCESSORS["avx2"]
    (n, k, _), fmt = SHAPES[0], FORMATS[2]
    parts, _, _ = stored(fmt, EXPERTS * n, k)
    _, (_, shape, dtype) = layout.packed_parts(fmt, n, k, isa, EXPERTS)
    packed = tvm.runtime.empty(shape, dtype)
    built("avx2", fmt)[f"repack_{n}_1"](tensor(parts[1]), packed)
    columns = shape[1]
    rows = packed.numpy().transpose(0, 2, 1).reshape(EXPERTS, -1, columns)  # [expert, row, column]
    assert rows.shape[1] % (isa.lanes * isa.tile_n) == 0
    np.testing.assert_array_equal(rows[:, :n], parts[1].reshape(EXPERTS, n, columns))
    assert not rows[:, n:].any()
