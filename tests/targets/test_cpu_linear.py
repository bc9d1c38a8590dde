"""The CPU's linear kernels and repack functions against numpy f64: formats, tails, processors."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm

from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import (
    BLOCK,
    CODE_BITS,
    GRIDS,
    SCALE_BITS,
    UNIT,
    WeightFormat,
    mxfp4,
)
from qcc.quant_schemes.packing import in_layout, unpack, unpack_stream
from qcc.runtime.machine import enable_tiles
from qcc.targets.cpu import TARGET
from qcc.targets.cpu.isa import AVX512, Isa, isa_of
from qcc.targets.cpu.kernels import layout
from qcc.targets.cpu.kernels.activations import HIGH, LOW, TILES, TILES_FROM, Activations, prepare
from qcc.targets.cpu.kernels.gemm import CHUNK
from qcc.targets.cpu.kernels.linear import gemm, gemv
from qcc.targets.cpu.kernels.steps import MAX_STEP, steps_of
from qcc.targets.cpu.kernels.table_rows import table_rows
from qcc.targets.cpu.kernels.tiles import SLAB
from qcc.targets.cpu.passes.schedule import schedule_loops

from .aarch64 import Emulated
from .linear_weights import PROCESSORS, RELATIVE, asymmetric, lacks, q, stored, tensor

FLOATS = [WeightFormat(32, "float32"), WeightFormat(16, "float16"), WeightFormat(16, "bfloat16")]


FORMATS = [
    *FLOATS,
    # the contract's
    q(4, 32),
    q(4, 32, "bfloat16"),
    q(4, 32, "float32", "KN"),
    q(3, 40),
    q(3, 40, "bfloat16", "KN"),
    q(8, 32),
    # dense streams, codes across words; groups that fill no step, many steps, a row, a tensor
    q(2, 8),
    q(3, 24),
    q(5, 40, "bfloat16"),
    q(6, 256, "float16", "KN"),
    q(5, 200),
    q(4, 1000),
    q(6, "row", "float32"),
    q(8, "tensor"),
    q(5, "tensor", "float16", "KN"),
    mxfp4("float16"),
    # zero codes, biases, zero points
    q(4, 32, zero=8),
    q(2, 64, zero=1),
    asymmetric(3, 32),
    asymmetric(8, "row", "bfloat16"),
    asymmetric(6, 16, "float32", "KN"),
    q(4, 128, grid="zero_point"),
    q(3, 24, "bfloat16", "KN", grid="zero_point"),
    q(8, "tensor", grid="zero_point"),
    # two-level scales, codes in words and in bytes
    asymmetric(2, 16, scale_bits=4),
    q(2, 8, "bfloat16", "KN", scale_bits=4),
    asymmetric(3, 32, "bfloat16", "KN", scale_bits=6),
    q(3, 16, scale_bits=6),
    asymmetric(6, 256, scale_bits=8),
    q(5, 128, "float32", scale_bits=5),
]
ROW = 297  # columns where a group is a row
SMALL = (64, 20)  # (n, k)
ROWS = (5, 6, 23, 43)  # of x: below, at and above the register tile's six; two and three tiles
MORE = {TILES: (16 * SLAB + 21,)}  # two slabs


def names(fmt: WeightFormat, n: int, k: int) -> str:
    return f"{'_'.join(str(value) for value in fmt.as_dict().values())}_{n}_{k}"


def adds(fmt: WeightFormat) -> bool:
    """Whether a format's kernels are those that add to something."""
    return fmt.bits % 4 != 0 or fmt in FORMATS[1::2]


def kernels(fmt: WeightFormat, n: int, k: int, isa: Isa, with_gemm: bool) -> dict[str, Any]:
    """The kernels of a weight by name."""
    made = {"gemv": gemv(fmt, n, k, isa, adds(fmt)), "rows": table_rows(fmt, n, k, isa)}
    if with_gemm:
        made["gemm"] = gemm(fmt, n, k, isa, adds(fmt))
    for name, rows in (("prepare1", 1), ("prepare", None)):
        kind = Activations.of(fmt, k, rows == 1, isa)
        if kind is not None and (rows == 1 or with_gemm):
            made[name] = prepare(kind, rows, isa)
    return made


def repacks(fmt: WeightFormat, n: int, k: int, isa: Isa) -> dict[str, Any]:
    """The functions by name that put a weight into the kernels' layout."""
    return {
        f"repack{part}": schedule_loops(layout.repack_func(fmt, n, k, part, isa), isa)
        for part in range(len(fmt.stored(n, k)))
    }


def shape_of(fmt: WeightFormat) -> tuple[int, int]:
    """(n, k): rows that fill no vector and no panel; two chunks of columns, a unit, and a rest.

    The rest fills no quad, no word and no group.
    """
    step = steps_of(fmt, ROW).step
    whole = fmt.group in ("row", "tensor")
    return 129, ROW if whole else 2 * max(CHUNK // step, 1) * step + UNIT + 9


def shapes(processor: str, fmt: WeightFormat) -> list[tuple[int, int]]:
    """Of some formats one panel and rows shorter than a step as well."""
    some = {"vnni": FORMATS[::12], "amx": FLOATS}.get(processor, [])
    return [shape_of(fmt), SMALL] if fmt in some else [shape_of(fmt)]


def built(processor: str, functions: dict[str, Any], name: str) -> Any:
    """Functions compiled for a processor, to be called here under their names."""
    isa, description = PROCESSORS[processor]
    target = tvm.target.Target(description)
    assert isa_of(target) == isa
    module = {key: func.with_attr("global_symbol", key) for key, func in functions.items()}
    needless = list(TARGET.needless_passes)
    with target, tvm.transform.PassContext(disabled_pass=needless):
        lib = tvm.compile(tvm.IRModule(module), target)
    return Emulated(lib, name) if "neon" in processor else lib


def repacked(lib: Any, fmt: WeightFormat, n: int, k: int, isa: Isa, parts: list[Any]) -> list[Any]:
    """The parts as the kernels read them, by the compiled repack functions."""
    made = []
    for i, (_, shape, dtype) in enumerate(layout.packed_parts(fmt, n, k, isa)):
        out = tvm.runtime.empty(shape, dtype)
        lib[f"repack{i}"](tensor(parts[i]), out)
        made.append(out)
    return made


def aligned(array: Any) -> Any:
    """A tensor at a multiple of 64 bytes, as TVM's own are."""
    found = tvm.runtime.empty(array.shape, str(array.dtype))
    return found.copyfrom(array)


def activations(lib: Any, fmt: WeightFormat, x: Any, mode: int, isa: Isa) -> list[Any]:
    """What the kernels take after x: what `prepare` made, junk where it made nothing, and mode."""
    m, k = x.shape
    kind = Activations.of(fmt, k, m == 1, isa)
    if kind is None:
        return []
    shapes = [([int(extent) for extent in shape], dtype) for _, shape, dtype in kind.parts(m)]
    made = [aligned(np.full(shape, 3, dtype)) for shape, dtype in shapes]
    chosen = tensor(np.array([mode], np.int32))
    lib["prepare1" if m == 1 else "prepare"](tensor(x), chosen, *made)
    return [*made, chosen]


def bf16(numbers: Any, ties: str) -> Any:
    """f64 of numbers rounded to bf16, ties to even or away from 0."""
    bits = numbers.astype("float32").view(np.uint32)
    half = 0x7FFF + (bits >> 16 & 1) if ties == "even" else np.uint32(0x8000)
    return ((bits + half) & np.uint32(0xFFFF0000)).view("float32").astype("float64")


def rounded(x: Any, codes: Any, scales: Any) -> Any:
    """f64[m, k] that int8 codes stand for, after checking them: groups of 32 under max / 127."""
    m, k = x.shape
    padded = np.zeros((m, k + -k % 32))
    padded[:, :k] = x
    top = np.abs(padded).reshape(m, -1, 32).max(-1)
    np.testing.assert_allclose(scales, top / 127, rtol=1e-6)
    found = codes * np.repeat(scales.astype("float64"), 32, axis=1)
    half = np.repeat(top / 127, 32, axis=1) * (0.5 + 1e-4)
    assert (np.abs(found - padded) <= half).all() and np.abs(codes).max() == 127
    return found[:, :k]


CASES = [("avx512", fmt) for fmt in (q(8, 32), q(2, 64, zero=1), asymmetric(8, "row", "bfloat16"))]
CASES += [("avx2_vnni", fmt) for fmt in FORMATS[5::9]] + [("avx2", fmt) for fmt in FORMATS[1::6]]
# Every format with table lookup, 16 lanes and VNNI. The time goes into compiling, most of it into
# GEMMs: each format has its own on one of these processors, but for dtypes of scales and layouts,
# which are the same to GEMV and GEMM.
ELSEWHERE = [(fmt.bits, fmt.group, fmt.grid) for _, fmt in CASES if not fmt.is_float]
GEMMS = [fmt for fmt in FORMATS if (fmt.bits, fmt.group, fmt.grid) not in ELSEWHERE] + [q(4, 32)]
CASES += [("vnni", fmt) for fmt in FORMATS]
# Tiles, no dot product, and under emulation: each way to decode and to multiply.
CASES += [("amx", fmt) for fmt in (FLOATS[2], asymmetric(2, 16, scale_bits=4), q(8, 24))]
CASES += [("sse", fmt) for fmt in FORMATS[2::14]] + [("neon", fmt) for fmt in (FLOATS[2], q(4, 32))]
CASES += [("neon_dot", q(8, 32)), ("neon_dot", asymmetric(2, 16, scale_bits=4))]
CASES += [("neon_dot", mxfp4("float16")), ("neon_i8mm", q(4, 32)), ("neon_i8mm", asymmetric(3, 32))]
IDS = [f"{processor}-{names(fmt, 0, 0)[:-4]}" for processor, fmt in CASES]


@pytest.fixture
def processor(request: Any) -> str:
    if why := lacks(request.param):
        pytest.skip(why)
    return str(request.param)


def modes(fmt: WeightFormat, isa: Isa) -> tuple[int, ...]:
    """The modes that a format's kernels know."""
    if isa.tiles and enable_tiles():
        return (TILES,)  # of the others the tests of `vnni`
    return (HIGH, LOW) if isa.dot and not fmt.is_float else (HIGH,)


@pytest.mark.parametrize(("processor", "fmt"), CASES, ids=IDS, indirect=["processor"])
def test_kernels(processor: str, fmt: WeightFormat) -> None:
    """gemv, gemm and table_rows over weights that the repack functions made."""
    isa, _ = PROCESSORS[processor]
    with_gemm = processor != "vnni" or fmt in GEMMS
    random = np.random.default_rng(0)
    for n, k in shapes(processor, fmt):
        functions = kernels(fmt, n, k, isa, with_gemm) | repacks(fmt, n, k, isa)
        lib = built(processor, functions, f"{processor}_{names(fmt, n, k)}")
        parts, weights, bias = stored(fmt, n, k)
        size = np.abs(weights - bias) + np.abs(bias)
        packed = repacked(lib, fmt, n, k, isa, parts)

        def close(kind: str, m: int, mode: int, lib: Any = lib, n: int = n, k: int = k,
                  w: Any = weights, p: Any = packed, size: Any = size) -> None:  # fmt: skip
            x = random.normal(size=(m, k)).astype("float32")
            given = activations(lib, fmt, x, mode, isa)
            exact = x.astype("float64")
            if mode == TILES and m >= TILES_FROM:
                exact, w = bf16(x, "even"), bf16(w, "away")
            elif mode != HIGH and len(given) > 3:
                exact = rounded(x, given[0].numpy(), given[1].numpy())
            out = aligned(np.full((m, n), np.nan, "float32"))
            added = random.normal(size=(m, n)).astype("float32")
            lib[kind](tensor(x), *given, *p, *([aligned(added)] if adds(fmt) else []), out)
            bound = np.abs(exact) @ size.T + np.abs(added)
            error = np.abs(out.numpy() - exact @ w.T - (added if adds(fmt) else 0))
            assert (error <= RELATIVE * bound + 1e-12).all(), (kind, n, k, m, (error / bound).max())

        for mode in modes(fmt, isa):
            close("gemv", 1, mode)
            for m in (*ROWS, *MORE.get(mode, ())) if with_gemm else ():
                close("gemm", m, mode)
        ids = np.array([n - 1, 0, n // 2, -3, n, 2**31 - 1], np.int32)
        out = tensor(np.full((len(ids), k), np.nan, "float32"))
        lib["rows"](*packed, tensor(ids), out)
        # Products of small whole numbers and scales of 16 bits are exact, a sum is rounded once.
        expected = weights[np.clip(ids, 0, n - 1)].astype("float32")
        if fmt.dtype != "float32" or fmt.is_float:
            np.testing.assert_array_equal(out.numpy(), expected)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=RELATIVE * size.max())


@pytest.mark.parametrize(("processor", "fmt"), CASES[::5], ids=IDS[::5], indirect=["processor"])
def test_layout(processor: str, fmt: WeightFormat) -> None:
    """Row r lies in lane r % L of block r // L; blocks fill whole panels, padded with 0."""
    isa, _ = PROCESSORS[processor]
    n, k = shape_of(fmt)
    parts, _, _ = stored(fmt, n, k)
    lib = built(processor, repacks(fmt, n, k, isa), f"{processor}_{names(fmt, n, k)}_repack")
    made = repacked(lib, fmt, n, k, isa, parts)
    for part, packed in zip(parts, made, strict=True):
        rows = part if fmt.is_float else in_layout(part, fmt)
        blocks, columns, lanes = packed.shape
        flat = packed.numpy().transpose(0, 2, 1).reshape(-1, columns)  # [row, column]
        if rows.dtype == ml_dtypes.bfloat16:
            rows = rows.view(np.uint16) if flat.dtype == np.uint16 else rows.astype("float32")
        if flat.dtype == np.uint8:
            bits = fmt.bits if fmt.grid == "zero_point" else fmt.scale_bits
            rows = unpack_stream(rows, bits or 0, fmt.num_groups(k))
        assert lanes == isa.lanes and blocks % isa.tile_n == 0
        if part is parts[0] and not fmt.is_float:
            assert columns == -(-k // 32) * fmt.bits
            np.testing.assert_array_equal(
                quad_codes(flat[:n], fmt.bits, k), unpack(part, fmt, n, k)
            )
            assert not flat[n:].any()
            continue
        assert columns == rows.shape[1]
        np.testing.assert_array_equal(flat[:n], np.broadcast_to(rows, (n, columns)))
        assert not flat[n:].any()


def quad_codes(words: Any, bits: int, k: int) -> Any:
    """uint32[n, words] of quads -> codes uint8[n, k]; bytes hold codes and shares of others."""
    each = 8 // bits
    used, mask = each * bits, 2**bits - 1
    codes = np.zeros((len(words), k + -k % 32), np.uint8)
    for unit, byte in itertools.product(range(codes.shape[1] // 32), range(4)):
        own = words[:, unit * bits : (unit + 1) * bits] >> 8 * byte & 0xFF
        quads = [own[:, i // each] >> bits * (i % each) & mask for i in range(used)]
        rest = sum(own[:, i].astype(np.uint64) >> used << i * (8 - used) for i in range(bits))
        quads += [rest >> bits * i & mask for i in range(8 - used)]
        for number, quad in enumerate(quads):
            codes[:, unit * 32 + 4 * number + byte] = quad
    return codes[:, :k]


def every_format() -> list[WeightFormat]:
    """All that can be, of two group sizes in three."""
    found = [WeightFormat(16, "float16")]
    groups: list[Any] = ["row", "tensor", *range(8, 1025, 24), *(2**i for i in range(3, 11))]
    for bits, group, grid in itertools.product(CODE_BITS, groups, GRIDS):
        for scale_bits in (None, *SCALE_BITS):
            try:
                found.append(q(bits, group, grid=grid, scale_bits=scale_bits))
            except SchemeError:
                assert scale_bits or grid == "mxfp4", f"{bits}/{group} {grid} is a format"
    return found


@pytest.mark.parametrize("k", [1, 33, 172, 2048])
def test_steps(k: int) -> None:
    """Short enough to unroll; words end with a step, and no scale changes within a segment."""
    for fmt in every_format():
        found = steps_of(fmt, k)
        assert found.step <= MAX_STEP and found.step % found.segment == 0, fmt
        assert sum(columns for _, columns in found.segments(found.step)) == found.step
        if not fmt.is_float:
            assert fmt.sparse_words or found.step * fmt.bits % 32 == 0, fmt
            assert fmt.group_size(k) % found.segment == 0, fmt
            assert not fmt.two_level or BLOCK % found.step == 0, fmt
            per_step = found.step // fmt.group_size(k) * (fmt.scale_bits or 0)
            assert not layout.streamed(fmt) or per_step % 32 == 0, fmt


def test_repacked_weights_are_no_larger() -> None:
    """Beyond the stored bits: zero points and two-level scales of 6 bits as bytes."""
    for fmt, most in (
        (asymmetric(2, 16, "float16", "NK", scale_bits=4), 0),
        (asymmetric(3, 32, "float16", "NK", scale_bits=6), 2 * 2 / 32),
        (q(4, 128, grid="zero_point"), 4 / 128),
        (q(5, 32), 0),
    ):
        n, k = 4096, 4096
        size = {"uint32": 4, "float16": 2, "uint8": 1}
        parts = layout.packed_parts(fmt, n, k, AVX512)
        nbytes = sum(int(np.prod(shape)) * size[dtype] for _, shape, dtype in parts)
        assert nbytes * 8 / (n * k) == fmt.bits_per_weight(n, k) + most, fmt


def _assembly(processor: str, fmt: WeightFormat) -> str:
    isa, description = PROCESSORS[processor]
    target = tvm.target.Target(description)
    func = gemv(fmt, 64, 256, isa).with_attr("global_symbol", "f")
    with target:
        return str(tvm.compile(tvm.IRModule({"f": func}), target).mod.inspect_source("asm"))


def test_narrow_codes_use_a_table_lookup() -> None:
    """One permutation turns 16 codes into numbers, and sums are fused multiply-adds."""
    text = _assembly("avx512", q(4, 32))
    lookups = text.count("vpermps") + text.count("vpermd")
    assert lookups == 32 and text.count("vfmadd") >= 32
    text = _assembly("avx512", q(5, 32))
    assert text.count("vpermi2ps") + text.count("vpermt2ps") == 32


@pytest.mark.parametrize(
    ("processor", "instruction"),
    [
        ("vnni", "vpdpbusd"),
        ("avx2_vnni", "{vex} vpdpbusd"),
        ("avx2", "vpmaddubsw"),
        ("neon_dot", "sdot"),
        ("neon_i8mm", "usdot"),
    ],
)
def test_codes_are_multiplied_by_dot_products(processor: str, instruction: str) -> None:
    """8 of a step of 32 columns, at least: a quad is one."""
    text = _assembly(processor, q(4, 32)).replace("\t", " ")
    assert text.count(f" {instruction} ") >= 8
