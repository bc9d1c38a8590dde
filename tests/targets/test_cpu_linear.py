"""The CPU's linear kernels and repack functions against numpy f64: formats, tails, processors."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm

from qcc.quant_schemes.scheme import WeightFormat
from qcc.targets.cpu.isa import AVX2, AVX512, NEON, SSE, Isa, isa_of
from qcc.targets.cpu.kernels import layout, linear
from qcc.targets.cpu.passes.schedule import schedule_loops

# |y - exact| <= this * sum |x||w|. Each f32 rounding adds 2^-24 = 6e-8 of a partial sum; the chains
# are a few dozen terms long, and errors average out. A lost or doubled column makes 1e-2 or more.
RELATIVE = 1e-6

PROCESSORS: dict[str, tuple[Isa, dict[str, Any]]] = {
    "avx512": (AVX512, {"kind": "llvm", "mcpu": "skylake-avx512"}),
    "avx2": (AVX2, {"kind": "llvm", "mcpu": "x86-64-v3"}),
    "sse": (SSE, {"kind": "llvm", "mcpu": "x86-64-v2"}),
    "neon": (
        NEON,
        {"kind": "llvm", "mtriple": "aarch64-unknown-linux-gnu", "mcpu": "cortex-a76"},
    ),
}
FLOATS = [WeightFormat(32, "float32"), WeightFormat(16, "float16"), WeightFormat(16, "bfloat16")]
FORMATS = [
    *FLOATS,
    WeightFormat(4, "float16", 32),
    WeightFormat(4, "bfloat16", 32),
    WeightFormat(4, "float32", 32, "KN"),
    WeightFormat(4, "float16", 8),
    WeightFormat(4, "float16", 256),
    WeightFormat(3, "float16", 40),
    WeightFormat(3, "bfloat16", 40, "KN"),
    WeightFormat(8, "float16", 32),
    WeightFormat(8, "float32", 32, "KN"),
]
# (n, k): rows that fill no vector and no panel, columns that fill no word, group or chunk.
SHAPES = [(37, 172), (64, 20), (129, 352)]
ROWS = (1, 5, 6, 23)  # of x: below, at and above the register tile's six


def _flags() -> set[str]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        line = next((line for line in file if line.startswith("flags")), ":")
    return set(line.split(":", 1)[1].split())


def runnable(name: str) -> bool:
    avx512 = {"avx512f", "avx512bw", "avx512vl"}
    needed = {"avx512": avx512, "avx2": {"avx2", "fma"}, "sse": {"sse4_2"}}
    return name in needed and needed[name] <= _flags()


def names(fmt: WeightFormat, n: int, k: int) -> str:
    return f"{fmt.bits}{fmt.dtype}{fmt.group}{fmt.layout}_{n}_{k}"


def functions(fmt: WeightFormat, n: int, k: int, isa: Isa) -> dict[str, Any]:
    """Every kernel of a weight, under the names in the module."""
    made = {
        "gemv": linear.gemv(fmt, n, k, isa),
        "gemm": linear.gemm(fmt, n, k, isa),
        "rows": linear.table_rows(fmt, n, k, isa),
    }
    for part in range(len(fmt.stored(n, k))):
        made[f"repack{part}"] = schedule_loops(layout.repack_func(fmt, n, k, part, isa), isa)
    return {
        f"{kind}_{names(fmt, n, k)}": func.with_attr("global_symbol", f"{kind}_{names(fmt, n, k)}")
        for kind, func in made.items()
    }


@functools.cache
def built(processor: str, fmt: WeightFormat) -> Any:
    """The kernels of all shapes for a processor."""
    isa, description = PROCESSORS[processor]
    module: dict[str, Any] = {}
    for n, k in SHAPES:
        module |= functions(fmt, n, k, isa)
    target = tvm.target.Target(description)
    assert isa_of(target) == isa
    with target:
        return tvm.compile(tvm.IRModule(module), target)


def stored(fmt: WeightFormat, n: int, k: int) -> tuple[list[Any], Any]:
    """(stored parts, weights f64[n, k]); formula of CONTRACTS section 1. Padding codes are junk."""
    random = np.random.default_rng(n * k)
    kind = np.dtype(ml_dtypes.bfloat16 if fmt.dtype == "bfloat16" else fmt.dtype)
    if fmt.group is None:
        weights = random.normal(size=(n, k)).astype(kind)
        return [weights], weights.astype(np.float64)
    each, top = 32 // fmt.bits, 2 ** (fmt.bits - 1) - 1
    groups = -(-k // fmt.group)
    codes = random.integers(0, 2 * top + 1, (n, groups * fmt.group)).astype(np.uint32)
    scales = random.uniform(0.01, 0.1, (n, groups)).astype(kind)
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(fmt.bits)
    words = (codes.reshape(n, -1, each) << shifts).sum(axis=2, dtype=np.uint32)
    if fmt.bits == 3:
        words |= np.uint32(3 << 30)  # the unused bits
    weights = (codes - float(top)) * np.repeat(scales.astype(np.float64), fmt.group, axis=1)
    parts = [words, scales] if fmt.layout == "NK" else [words.T, scales.T]
    return [np.ascontiguousarray(part) for part in parts], weights[:, :k]


def tensor(array: Any) -> Any:
    return tvm.runtime.tensor(array)


def repacked(lib: Any, fmt: WeightFormat, n: int, k: int, isa: Isa, parts: list[Any]) -> list[Any]:
    """The parts as the kernels read them, by the compiled repack functions."""
    made = []
    for i, (_, shape, dtype) in enumerate(layout.packed_parts(fmt, n, k, isa)):
        out = tvm.runtime.empty(shape, dtype)
        lib[f"repack{i}_{names(fmt, n, k)}"](tensor(parts[i]), out)
        made.append(out)
    return made


# Every format with table lookup and 16 lanes; elsewhere one of each way to decode.
CASES = [("avx512", fmt) for fmt in FORMATS]
CASES += [("avx2", fmt) for fmt in FORMATS[1:10:2]] + [("sse", fmt) for fmt in FORMATS[3:9:5]]
IDS = [f"{processor}-{names(fmt, 0, 0)[:-4]}" for processor, fmt in CASES]


@pytest.fixture
def processor(request: Any) -> str:
    if not runnable(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    return str(request.param)


@pytest.mark.parametrize(("processor", "fmt"), CASES, ids=IDS, indirect=["processor"])
def test_kernels(processor: str, fmt: WeightFormat) -> None:
    """gemv, gemm and table_rows over weights that the repack functions made."""
    isa, _ = PROCESSORS[processor]
    lib = built(processor, fmt)
    random = np.random.default_rng(0)
    for n, k in SHAPES:
        parts, weights = stored(fmt, n, k)
        packed = repacked(lib, fmt, n, k, isa, parts)

        def close(kind: str, m: int, n: int = n, k: int = k, w: Any = weights, p: Any = packed):
            x = random.normal(size=(m, k)).astype("float32")
            out = tensor(np.full((m, n), np.nan, "float32"))
            lib[f"{kind}_{names(fmt, n, k)}"](tensor(x), *p, out)
            bound = np.abs(x.astype("float64")) @ np.abs(w).T
            error = np.abs(out.numpy() - x.astype("float64") @ w.T)
            assert (error <= RELATIVE * bound + 1e-12).all(), (kind, n, k, m, (error / bound).max())

        close("gemv", 1)
        for m in ROWS:
            close("gemm", m)
        ids = np.array([n - 1, 0, n // 2, -3, n, 2**31 - 1], np.int32)
        out = tensor(np.full((len(ids), k), np.nan, "float32"))
        lib[f"rows_{names(fmt, n, k)}"](*packed, tensor(ids), out)
        # One product of a small whole number and a scale: rounded once.
        expected = weights[np.clip(ids, 0, n - 1)].astype("float32")
        np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize(("processor", "fmt"), CASES[::4], ids=IDS[::4], indirect=["processor"])
def test_layout(processor: str, fmt: WeightFormat) -> None:
    """Row r lies in lane r % L of block r // L; blocks fill whole panels, padded with 0."""
    isa, _ = PROCESSORS[processor]
    n, k = SHAPES[0]
    parts, _ = stored(fmt, n, k)
    made = repacked(built(processor, fmt), fmt, n, k, isa, parts)
    for part, packed in zip(parts, made, strict=True):
        rows = part.T if fmt.layout == "KN" and fmt.group is not None else part
        blocks, columns, lanes = packed.shape
        assert lanes == isa.lanes and blocks % isa.tile_n == 0 and columns == rows.shape[1]
        flat = packed.numpy().transpose(0, 2, 1).reshape(-1, columns)  # [row, column]
        if rows.dtype == ml_dtypes.bfloat16:
            rows = rows.view(np.uint16) if flat.dtype == np.uint16 else rows.astype("float32")
        np.testing.assert_array_equal(flat[:n], rows)
        assert not flat[n:].any()


@pytest.mark.parametrize("fmt", FORMATS[2:4], ids=lambda fmt: names(fmt, 0, 0)[:-4])
def test_aarch64_compiles(fmt: WeightFormat, tmp_path: Any) -> None:
    """To an object with its functions; nothing here runs it."""
    lib = built("neon", fmt)
    path = tmp_path / "lib.o"
    lib.mod.write_to_file(str(path), "o")
    data = path.read_bytes()
    assert data[:4] == b"\x7fELF" and data[18] == 183, "EM_AARCH64"
    for n, k in SHAPES:
        assert f"gemv_{names(fmt, n, k)}".encode() in data


def _assembly(fmt: WeightFormat) -> str:
    isa, description = PROCESSORS["avx512"]
    target = tvm.target.Target(description)
    func = linear.gemv(fmt, 64, 256, isa).with_attr("global_symbol", "f")
    with target:
        return str(tvm.compile(tvm.IRModule({"f": func}), target).mod.inspect_source("asm"))


def test_four_bit_gemv_uses_the_table_lookup() -> None:
    """One permutation turns 16 codes into numbers, and sums are fused multiply-adds."""
    text = _assembly(WeightFormat(4, "float16", 32))
    lookups = text.count("vpermps") + text.count("vpermd")
    assert lookups == 32 and text.count("vfmadd") >= 32
