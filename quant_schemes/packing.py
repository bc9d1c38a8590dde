"""Codes <-> uint32 words and stored parts -> weights, each twice: as numpy and as a TIR expression.

A row of codes is a dense stream, least significant bit first, padded with 0 to whole groups:
    code i is at bits [i*bits, (i+1)*bits) of the row's words, so that 32 codes are `bits` words
The contract's 3 bits in groups of 40 alone put 10 codes in a word and leave its top 2 bits 0.
    NK:  q_weight       uint32[n, ceil(g*G*bits / 32)]    g = ceil(k/G) groups, G = group (a row:
         q_scale        dtype[n, g]                       k rounded up to 32; a tensor: likewise,
         q_bias         dtype[n, g]                       and q_scale, q_bias, q_zero have 1 row)
         q_zero         uint32[n, ceil(g*bits / 32)]      a stream of zero points, like codes
    two-level:
         q_scale        uint32[n, ceil(g*scale_bits / 32)]   a stream of scale codes
         q_bias         uint32[n, ceil(g*scale_bits / 32)]   a stream of bias codes
         q_block_scale, q_block_bias   dtype[n, ceil(k/256)]
    mxfp4:
         q_scale        uint32[n, ceil(g*8 / 32)]         a stream of exponents
    KN:  all of them transposed
How codes are chosen is the business of rounding/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcc.quant_schemes import mxfp4
from qcc.quant_schemes.format import BLOCK, UNIT, WeightFormat, stream_words

Array = npt.NDArray[Any]


def float_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of "float32", "float16" or "bfloat16" (ml_dtypes)."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclass(frozen=True)
class Grid:
    """What turns the codes of a weight [n, k] into numbers, before packing; rows first.

    `scale` and `bias`: fmt.dtype[n, groups], or with two-level scales uint8[n, groups] codes under
    `block_scale` and `block_bias` fmt.dtype[n, blocks]. `zero` uint8[n, groups]. One row instead of
    n where the group is the tensor. The scales of mxfp4 are their exponents, uint8[n, groups].
    """

    scale: Array
    bias: Array | None = None
    zero: Array | None = None
    block_scale: Array | None = None
    block_bias: Array | None = None

    @classmethod
    def concatenate(cls, grids: Sequence[Grid]) -> Grid:
        """Grids of one format (no tensor-wide scale), one below the other."""
        stacked: dict[str, Any] = {}
        for item in fields(cls):
            each = [getattr(grid, item.name) for grid in grids]
            stacked[item.name] = None if each[0] is None else np.concatenate(each)
        return cls(**stacked)

    def rows(self, better: Array, other: Grid) -> Grid:
        """This grid's rows where `better` bool[n], the other's elsewhere."""
        picked: dict[str, Any] = {}
        for item in fields(self):
            mine, its = getattr(self, item.name), getattr(other, item.name)
            picked[item.name] = None if mine is None else np.where(better[:, None], mine, its)
        return Grid(**picked)

    def numbers(self, fmt: WeightFormat) -> tuple[Array, Array]:
        """(scale, bias) f32[n, groups] of w' = q * scale + bias.

        For a symmetric grid the bias is -zero * scale.
        """
        scale, bias = self.scale.astype(np.float32), self.bias
        assert fmt.grid != "mxfp4", "its codes are no multiples of a scale"
        if fmt.scale_bits is not None:
            scale = (scale - np.float32(fmt.scale_zero)) * self._spread(self.block_scale, fmt)
        if fmt.grid == "asymmetric":
            assert bias is not None
            offset = bias.astype(np.float32)
            if fmt.scale_bits is not None:
                offset = offset * self._spread(self.block_bias, fmt)
            return scale, offset
        zero = np.float32(fmt.zero_code) if self.zero is None else self.zero.astype(np.float32)
        return scale, -zero * scale

    def _spread(self, of_blocks: Array | None, fmt: WeightFormat) -> Array:
        """Numbers of blocks [n, blocks] -> of their groups f32[n, groups]."""
        assert of_blocks is not None and isinstance(fmt.group, int)
        per_group = np.repeat(of_blocks.astype(np.float32), BLOCK // fmt.group, axis=1)
        return per_group[:, : self.scale.shape[1]]


@dataclass(frozen=True)
class Quantized:
    """A quantized weight before packing: `codes` uint8[n, k] and their grid."""

    codes: Array
    grid: Grid

    @classmethod
    def concatenate(cls, parts: Sequence[Quantized]) -> Quantized:
        """Weights of one format (no tensor-wide scale), one below the other."""
        codes = np.concatenate([part.codes for part in parts])
        return cls(codes, Grid.concatenate([part.grid for part in parts]))


def pack_stream(codes: Array, bits: int) -> npt.NDArray[np.uint32]:
    """Unsigned codes [n, m] -> uint32[n, ceil(m*bits / 32)], a dense stream for each row."""
    n, m = codes.shape
    words = np.zeros((n, stream_words(m, bits)), np.uint32)
    for i in range(min(UNIT, m)):  # codes UNIT apart lie at the same bits of words `bits` apart
        word, shift = divmod(i * bits, 32)
        part = codes[:, i::UNIT].astype(np.uint64) << np.uint64(shift)
        words[:, word::bits][:, : part.shape[1]] |= (part & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        if shift + bits > 32:
            over = words[:, word + 1 :: bits]
            over |= (part >> np.uint64(32)).astype(np.uint32)[:, : over.shape[1]]
    return words


def unpack_stream(words: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_stream`: the first `count` codes of each row, uint8[n, count]."""
    n = len(words)
    assert words.shape == (n, stream_words(count, bits)), f"{words.shape} for {count} codes"
    wide = np.zeros((n, words.shape[1] + 1), np.uint64)
    wide[:, :-1] = words
    codes = np.empty((n, count), np.uint8)
    mask = np.uint64(2**bits - 1)
    for i in range(min(UNIT, count)):
        word, shift = divmod(i * bits, 32)
        at = np.arange(word, word + bits * (-(-(count - i) // UNIT)), bits)
        value = wide[:, at] >> np.uint64(shift)
        if shift + bits > 32:
            value |= wide[:, at + 1] << np.uint64(32 - shift)
        codes[:, i::UNIT] = value & mask
    return codes


def pack(codes: Array, fmt: WeightFormat) -> npt.NDArray[np.uint32]:
    """Pack codes, an unsigned [n, k], into words in the format's layout.

    Returns:
        uint32[n, num_words(k)] for NK, C-contiguous; its transpose for KN.
    """
    n, k = codes.shape
    words = fmt.num_words(k)
    if not fmt.sparse_words:
        padded = np.zeros((n, fmt.num_groups(k) * fmt.group_size(k)), np.uint8)
        padded[:, :k] = codes
        return in_layout(pack_stream(padded, fmt.bits), fmt)
    per_word = 32 // fmt.bits
    padded = np.zeros((n, words * per_word), np.uint8)
    padded[:, :k] = codes
    packed = np.zeros((n, words), np.uint32)
    for e in range(per_word):
        packed |= padded[:, e::per_word].astype(np.uint32) << np.uint32(e * fmt.bits)
    return in_layout(packed, fmt)


def unpack(words: Array, fmt: WeightFormat, n: int, k: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack`: words in the format's layout -> codes uint8[n, k]."""
    rows = in_layout(words, fmt)
    assert rows.shape == (n, fmt.num_words(k)), f"words {words.shape} for a weight [{n}, {k}]"
    if not fmt.sparse_words:
        codes = unpack_stream(rows, fmt.bits, fmt.num_groups(k) * fmt.group_size(k))
        return np.ascontiguousarray(codes[:, :k])
    per_word = 32 // fmt.bits
    codes = np.empty((n, rows.shape[1] * per_word), np.uint8)
    for e in range(per_word):
        codes[:, e::per_word] = (rows >> np.uint32(e * fmt.bits)) & np.uint32(2**fmt.bits - 1)
    return np.ascontiguousarray(codes[:, :k])


def in_layout(rows: Array, fmt: WeightFormat) -> Array:
    """[n, x] as the format stores it, or back (a transpose is its own inverse); C-contiguous."""
    return np.ascontiguousarray(rows.T if fmt.layout == "KN" else rows)


def store(weight: Quantized, fmt: WeightFormat) -> dict[str, Array]:
    """The stored parts of a weight by suffix, in the order of `fmt.stored`."""
    parts: dict[str, Array] = {"q_weight": pack(weight.codes, fmt)}
    for suffix, numbers, bits in _grid_parts(weight.grid, fmt):
        assert numbers is not None, f"{fmt} needs {suffix}"
        parts[suffix] = in_layout(pack_stream(numbers, bits) if bits else numbers, fmt)
    return parts


def load(parts: Mapping[str, Array], fmt: WeightFormat, n: int, k: int) -> Quantized:
    """The inverse of `store` for a weight [n, k]."""
    groups, found = fmt.num_groups(k), {}
    for suffix, _, bits in _grid_parts(None, fmt):
        rows = in_layout(parts[suffix], fmt)
        found[suffix.removeprefix("q_")] = unpack_stream(rows, bits, groups) if bits else rows
    return Quantized(unpack(parts["q_weight"], fmt, n, k), Grid(**found))


def _grid_parts(grid: Grid | None, fmt: WeightFormat) -> list[tuple[str, Array | None, int | None]]:
    """(suffix, numbers, bits of a stream or None) of every part but q_weight, in order."""
    names = [part.suffix for part in fmt.stored(1, 1)][1:]
    streamed = {"q_zero": fmt.bits, "q_scale": fmt.scale_bits, "q_bias": fmt.scale_bits}
    return [
        (name, getattr(grid, name.removeprefix("q_"), None), streamed.get(name)) for name in names
    ]


def dequantize(
    parts: Mapping[str, Array], fmt: WeightFormat, n: int, k: int, dtype: str = "float32"
) -> Array:
    """The weights that stored parts stand for, by the formula of the format's grid.

    Args:
        parts: suffix -> array, as `store` returns; {"weight": [n, k]} for a float format.
        fmt: of the weight.
        n: rows (output features).
        k: columns (input features).
        dtype: what every step is computed and rounded in, and the dtype of the result. The
            product is exact in float32 where scales have 16 bits; the format's own dtype gives
            what the contract's formula says to the bit.

    Returns:
        dtype[n, k].
    """
    if fmt.is_float:
        return parts["weight"].astype(float_dtype(dtype))
    return dequantize_codes(load(parts, fmt, n, k), fmt, dtype)


def dequantize_codes(weight: Quantized, fmt: WeightFormat, dtype: str = "float32") -> Array:
    """The weights dtype[n, k] that codes and their grid stand for; see `dequantize`."""
    out = float_dtype(dtype)
    grid = weight.grid
    n, k = weight.codes.shape
    group = fmt.group_size(k)

    def wide(numbers: Array) -> Array:
        return np.repeat(np.broadcast_to(numbers, (n, numbers.shape[1])), group, axis=1)[:, :k]

    def of_blocks(codes: Array, base: int, blocks: Array | None) -> Array:
        assert blocks is not None
        small = (codes.astype(np.float32) - np.float32(base)).astype(out)
        per_group = np.repeat(blocks.astype(out), BLOCK // group, axis=1)
        numbers: Array = small * per_group[:, : codes.shape[1]]
        return numbers

    if fmt.grid == "mxfp4":
        exact: Array = mxfp4.numbers(weight.codes) * wide(mxfp4.powers(grid.scale))
        return exact.astype(out)
    two = fmt.two_level
    scale = of_blocks(grid.scale, fmt.scale_zero, grid.block_scale) if two else grid.scale
    scale = wide(scale.astype(out))
    codes = weight.codes.astype(np.float32)
    if fmt.grid == "asymmetric":
        assert grid.bias is not None
        bias = of_blocks(grid.bias, 0, grid.block_bias) if two else grid.bias
        return codes.astype(out) * scale + wide(bias.astype(out))
    # Differences of codes are small whole numbers: exact in every dtype.
    zero = np.float32(fmt.zero_code) if grid.zero is None else wide(grid.zero.astype("f4"))
    return (codes - zero).astype(out) * scale


def dequantize_expr(
    fmt: WeightFormat, parts: Sequence[Any], n: Any, k: Any, row_length: int, dtype: str
) -> Any:
    """Element [n, k] of a quantized weight as a TIR expression of `dtype`.

    Args:
        fmt: a quantized format.
        parts: te tensors or TIR buffers of the stored parts, in the order of `fmt.stored`.
        n: row, an integer expression.
        k: column, likewise; must lie before the weight's k (codes past it are padding).
        row_length: the weight's k.
        dtype: what every step is computed in.
    """
    assert not fmt.is_float, "a float format has no codes"
    read = _Read(fmt, parts, n, k, row_length)
    q = read.code("q_weight", n, k, fmt.bits, fmt.sparse_words)
    if fmt.grid == "mxfp4":
        number = mxfp4.number_expr(q.astype("uint32")) * read.power()
        return number.astype(dtype)
    scale, offset = read.scale(dtype), read.offset(dtype)
    if fmt.grid == "asymmetric":
        return q.astype(dtype) * scale + offset
    return (q - offset).astype(dtype) * scale


def grid_expr(
    fmt: WeightFormat, parts: Sequence[Any], n: Any, k: Any, row_length: int, dtype: str
) -> tuple[Any, Any]:
    """(scale, offset) of the group that element [n, k] is in; see `dequantize_expr`.

    Returns:
        The scale in `dtype` (for mxfp4 the power of two, float32), and by the grid: the bias in
        `dtype`, the code of zero int32, or for mxfp4 None.
    """
    read = _Read(fmt, parts, n, k, row_length)
    if fmt.grid == "mxfp4":
        return read.power(), None
    return read.scale(dtype), read.offset(dtype)


class _Read:
    """The numbers around element [n, k] of a quantized weight, as TIR expressions."""

    def __init__(
        self, fmt: WeightFormat, parts: Sequence[Any], n: Any, k: Any, row_length: int
    ) -> None:
        from tvm import tirx

        self.fmt, self.column = fmt, k
        self.row = n * 0 if fmt.group == "tensor" else n
        # A Python int takes the dtype of the index: FuseTIR refuses a mix of int32 and int64.
        self.group = tirx.floordiv(k, fmt.group_size(row_length))
        suffixes = [part.suffix for part in fmt.stored(1, row_length)]
        self.named = dict(zip(suffixes, parts, strict=True))

    def at(self, suffix: str, row: Any, column: Any) -> Any:
        """An element of a stored part."""
        part = self.named[suffix]
        return part[row, column] if self.fmt.layout == "NK" else part[column, row]

    def code(self, suffix: str, row: Any, index: Any, bits: int, sparse: bool = False) -> Any:
        """Code `index` of a stream, int32."""
        from tvm import tirx

        if sparse:
            word, first = tirx.floordiv(index, 32 // bits), tirx.floormod(index, 32 // bits) * bits
        else:
            word, first = tirx.floordiv(index * bits, 32), tirx.floormod(index * bits, 32)
        shift = first.astype("uint32")
        value = self.at(suffix, row, word) >> shift
        if not sparse and 32 % bits:
            # The code's upper bits lie in the next word; where they do not, it is not read.
            rest = tirx.const(32, "uint32") - shift
            over = self.at(suffix, row, word + 1) << rest
            none = tirx.const(0, "uint32")
            value = value | tirx.if_then_else(first + bits > 32, over, none)
        return (value & tirx.const(2**bits - 1, "uint32")).astype("int32")

    def power(self) -> Any:
        """The power of two of a group of mxfp4, float32."""
        exponent = self.code("q_scale", self.row, self.group, 8).astype("uint32")
        return mxfp4.power_expr(exponent)

    def scale(self, dtype: str) -> Any:
        """Of the group, in `dtype`."""
        if self.fmt.two_level:
            return self._of_block("q_scale", self.fmt.scale_zero, "q_block_scale", dtype)
        return self.at("q_scale", self.row, self.group).astype(dtype)

    def offset(self, dtype: str) -> Any:
        """The group's bias in `dtype`, or the code of zero int32."""
        from tvm import tirx

        if self.fmt.grid == "asymmetric":
            if self.fmt.two_level:
                return self._of_block("q_bias", 0, "q_block_bias", dtype)
            return self.at("q_bias", self.row, self.group).astype(dtype)
        if self.fmt.grid == "zero_point":
            return self.code("q_zero", self.row, self.group, self.fmt.bits)
        return tirx.const(self.fmt.zero_code, "int32")

    def _of_block(self, suffix: str, base: int, block: str, dtype: str) -> Any:
        from tvm import tirx

        assert self.fmt.scale_bits is not None
        code = self.code(suffix, self.row, self.group, self.fmt.scale_bits)
        number = self.at(block, self.row, tirx.floordiv(self.column, BLOCK))
        return (code - tirx.const(base, "int32")).astype(dtype) * number.astype(dtype)
