"""ggml's block types -> codes and grids, to the bit.

A row is blocks of 32 or 256 weights one after another. Bytes of a block, numbers little endian
(nibbles: the lower half of the weights in the low ones):
    Q4_0  32: d f16, 16 nibbles                       w = d (q - 8)
    Q4_1  32: d f16, m f16, 16 nibbles                w = d q + m
    Q5_0  32: d f16, 4 fifth bits, 16 nibbles         w = d (q - 16)
    Q5_1  32: d f16, m f16, 4 fifth bits, 16 nibbles  w = d q + m
    Q8_0  32: d f16, 32 int8                          w = d q
    Q2_K 256: 16 (scale | min << 4), 64 codes, d f16, dmin f16      w = d s q - dmin m
    Q3_K 256: 32 third bits, 64 codes, 12 scales, d f16             w = d (s - 32) (q - 4)
    Q4_K 256: d f16, dmin f16, 12 scales and mins, 128 nibbles      w = d s q - dmin m
    Q5_K 256: d f16, dmin f16, 12 scales and mins, 32 fifth bits, 128 nibbles   likewise
    Q6_K 256: 128 nibbles, 64 upper bits, 16 int8 scales, d f16     w = d s (q - 32)
    TQ1_0 256: 48 bytes of 5, 4 of 4 base-3 digits, d f16           w = d (q - 1)
    TQ2_0 256: 64 codes, d f16                                      w = d (q - 1)
A byte b of TQ1_0 is ceil(256/243 * number), so that its digits are the upper parts of b*3, b*9, ...
Both dmin's sign and int8 offsets go into the grid's own numbers, so a WeightFormat says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized

_Decoded = tuple[Array, Grid]  # of m blocks: codes uint8[m, weights], a grid of m rows


@dataclass(frozen=True)
class BlockType:
    """A ggml type that a format represents: `decode` takes uint8[m, bytes of a block]."""

    weights: int  # in a block
    format: WeightFormat
    decode: Callable[[Array], _Decoded]


def quantized(kind: BlockType, data: Array, n: int, k: int) -> Quantized:
    """The codes and grid of a weight [n, k] whose rows are blocks: data uint8[n, bytes]."""
    codes, grid = kind.decode(data.reshape(n * (k // kind.weights), -1))

    def by_row(numbers: Array | None) -> Array | None:
        return None if numbers is None else np.ascontiguousarray(numbers).reshape(n, -1)

    parts = {item.name: by_row(getattr(grid, item.name)) for item in fields(Grid)}
    return Quantized(codes.reshape(n, k), Grid(**parts))  # type: ignore[arg-type]


def _halves(data: Array, begin: int) -> Array:
    """The f16 at a byte of each block, [m, 1]."""
    return np.ascontiguousarray(data[:, begin : begin + 2]).view(np.float16)


def _planes(data: Array, bits: int, run: int) -> Array:
    """Bytes of small numbers -> uint8[m, numbers].

    Each run of bytes holds, in its lowest bits, the first `run` numbers, above them the next.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spread = data.reshape(len(data), -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return spread.reshape(len(data), -1)


def _bits(data: Array) -> Array:
    """4 bytes -> uint8[m, 32]: bit i belongs to weight i."""
    return np.unpackbits(data, axis=1, bitorder="little")


def _q4_0(data: Array) -> _Decoded:
    return _planes(data[:, 2:], 4, 16), Grid(_halves(data, 0))


def _q4_1(data: Array) -> _Decoded:
    return _planes(data[:, 4:], 4, 16), Grid(_halves(data, 0), _halves(data, 2))


def _q5_0(data: Array) -> _Decoded:
    return _planes(data[:, 6:], 4, 16) | _bits(data[:, 2:6]) << 4, Grid(_halves(data, 0))


def _q5_1(data: Array) -> _Decoded:
    codes = _planes(data[:, 8:], 4, 16) | _bits(data[:, 4:8]) << 4
    return codes, Grid(_halves(data, 0), _halves(data, 2))


def _q8_0(data: Array) -> _Decoded:
    return data[:, 2:] ^ np.uint8(128), Grid(_halves(data, 0))  # int8 + 128


def _q2_k(data: Array) -> _Decoded:
    scales = data[:, :16]
    d, dmin = _halves(data, 80), _halves(data, 82)
    return _planes(data[:, 16:80], 2, 32), Grid(scales & 15, scales >> 4, None, d, -dmin)


def _q3_k(data: Array) -> _Decoded:
    codes = _planes(data[:, 32:96], 2, 32) | _planes(data[:, :32], 1, 32) << 2
    # 4 low bits of 16 scales in 8 bytes, 2 high bits in 4.
    scales = _planes(data[:, 96:104], 4, 8) | _planes(data[:, 104:108], 2, 4) << 4
    return codes, Grid(scales, block_scale=_halves(data, 108))


def _scales_and_mins(data: Array) -> tuple[Array, Array]:
    """12 bytes -> 8 scales and 8 mins of 6 bits: bytes 0-3 and 4-7 hold the first 4 of each.

    Bytes 8-11 hold the low nibbles of the last 4, whose upper bits are the tops of bytes 0-7.
    """
    first, second, last = data[:, :4], data[:, 4:8], data[:, 8:12]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return scales, mins


def _q4_k(data: Array) -> _Decoded:
    scales, mins = _scales_and_mins(data[:, 4:16])
    grid = Grid(scales, mins, None, _halves(data, 0), -_halves(data, 2))
    return _planes(data[:, 16:], 4, 32), grid


def _q5_k(data: Array) -> _Decoded:
    scales, mins = _scales_and_mins(data[:, 4:16])
    codes = _planes(data[:, 48:], 4, 32) | _planes(data[:, 16:48], 1, 32) << 4
    return codes, Grid(scales, mins, None, _halves(data, 0), -_halves(data, 2))


def _q6_k(data: Array) -> _Decoded:
    codes = _planes(data[:, :128], 4, 64) | _planes(data[:, 128:192], 2, 32) << 4
    scales = data[:, 192:208] ^ np.uint8(128)  # int8 + 128
    return codes, Grid(scales, block_scale=_halves(data, 208))


def _digits(data: Array, count: int) -> Array:
    """The first `count` base-3 digits of each byte, all first ones before the second."""
    powers = 3 ** np.arange(count)[:, None]
    fractions = (data[:, None].astype(np.uint16) * powers & 255).astype(np.uint16)
    return (fractions * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def _tq1_0(data: Array) -> _Decoded:
    runs = ((data[:, :32], 5), (data[:, 32:48], 5), (data[:, 48:52], 4))
    codes = np.concatenate([_digits(run, count) for run, count in runs], axis=1)
    return codes, Grid(_halves(data, 52))


def _tq2_0(data: Array) -> _Decoded:
    return _planes(data[:, :64], 2, 32), Grid(_halves(data, 64))


def _block(
    decode: Callable[[Array], _Decoded],
    bits: int,
    *,
    block: int = 32,
    group: int = 32,
    scale_bits: int | None = None,
    zero: int | None = None,
) -> BlockType:
    """A type whose format is symmetric about the code `zero`, else asymmetric."""
    grid = "asymmetric" if zero is None else "symmetric"
    fmt = WeightFormat(bits, "float16", group, grid=grid, zero=zero, scale_bits=scale_bits)
    return BlockType(block, fmt, decode)


BLOCK_TYPES = {
    "Q4_0": _block(_q4_0, 4, zero=8),
    "Q4_1": _block(_q4_1, 4),
    "Q5_0": _block(_q5_0, 5, zero=16),
    "Q5_1": _block(_q5_1, 5),
    "Q8_0": _block(_q8_0, 8, zero=128),
    "Q2_K": _block(_q2_k, 2, block=256, group=16, scale_bits=4),
    "Q3_K": _block(_q3_k, 3, block=256, group=16, scale_bits=6, zero=4),
    "Q4_K": _block(_q4_k, 4, block=256, group=32, scale_bits=6),
    "Q5_K": _block(_q5_k, 5, block=256, group=32, scale_bits=6),
    "Q6_K": _block(_q6_k, 6, block=256, group=16, scale_bits=8, zero=32),
    "TQ1_0": _block(_tq1_0, 2, block=256, group=256, zero=1),
    "TQ2_0": _block(_tq2_0, 2, block=256, group=256, zero=1),
}
