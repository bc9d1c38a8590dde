"""WeightFormat: how the numbers of one weight matrix are stored, as data.

A quantized weight w[n, k] (out, in) is codes q of `bits` bits and, for each group of columns of a
row, numbers that turn a code into a weight:
    symmetric    w' = (q - zero) * s             q_weight, q_scale
    asymmetric   w' = q * s + b                  q_weight, q_scale, q_bias
    zero_point   w' = (q - z) * s                q_weight, q_scale, q_zero
    mxfp4        w' = fp4(q) * 2^(c - 127)       q_weight, q_scale (c, 8 bits)
where fp4 is the 4-bit float of the OCP's MX formats: sign, 2 bits of exponent, 1 of mantissa.
With `scale_bits` the scales (and biases) are themselves codes under one number for each block of
BLOCK columns:
    symmetric    s = S * (c - 2^(scale_bits-1))  q_weight, q_scale (c), q_block_scale (S)
    asymmetric   s = S * c, b = B * d            and q_bias (d), q_block_bias (B)
Layouts are in packing.py, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from qcc.quant_schemes.errors import SchemeError

FLOAT_DTYPES = {"float32": 32, "float16": 16, "bfloat16": 16}
ITEMSIZE = {"uint32": 4, "float32": 4, "float16": 2, "bfloat16": 2}
CODE_BITS = (2, 3, 4, 5, 6, 8)
SCALE_BITS = (4, 5, 6, 8)
MIN_GROUP, MAX_GROUP = 8, 1024
BLOCK = 256  # columns under one block scale
GRIDS = ("symmetric", "asymmetric", "zero_point", "mxfp4")
MXFP4 = (4, 32, 8)  # bits, group, scale_bits of that grid
LAYOUTS = ("NK", "KN")
SPARSE = (3, 40)  # (bits, group) of the contract whose words leave their top bits unused
UNIT = 32  # codes of a dense stream that end at a word's end, whatever their bits
Group = int | Literal["row", "tensor"]


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix [n, k] (out, in) is stored.

    A float format (`bits` 16 or 32, no group) stores `name.weight` in `dtype`. A quantized one
    stores codes of `bits` bits and scales in `dtype`, one for each `group` columns, for each row
    ("row", per channel) or for all ("tensor"). `zero` is the code of a symmetric grid that stands
    for 0; None: the contract's M = 2^(bits-1) - 1, whose codes are 0..2M, else they are all of
    `bits` bits. `layout` NK stores [n, ...], KN the transposes.
    """

    bits: int
    dtype: str
    group: Group | None = None
    layout: str = "NK"
    grid: str = "symmetric"
    zero: int | None = None
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse a combination that no packing writes."""
        if self.dtype not in FLOAT_DTYPES:
            raise SchemeError(
                f"format: dtype {self.dtype!r} is not one of {', '.join(FLOAT_DTYPES)}"
            )
        if self.group is None:
            if self.bits != FLOAT_DTYPES[self.dtype]:
                raise SchemeError(
                    f"format: {self.bits} bits need a group size (a float format has "
                    f"{FLOAT_DTYPES[self.dtype]} bits for {self.dtype})"
                )
            return
        for reason in self._faults(self.group):
            raise SchemeError(f"format: {reason}")

    def _faults(self, group: Group) -> list[str]:
        """Why a quantized format cannot be."""
        found = []
        if self.bits not in CODE_BITS:
            found.append(f"{self.bits} bits; quantized formats have {CODE_BITS}")
        if isinstance(group, str):
            if group not in ("row", "tensor"):
                found.append(f"group {group!r} is neither a size nor 'row' nor 'tensor'")
        elif not MIN_GROUP <= group <= MAX_GROUP or group % 8:
            found.append(
                f"group {group} is not a multiple of 8 from {MIN_GROUP} to {MAX_GROUP} "
                "(or 'row', 'tensor')"
            )
        for what, value, allowed in (
            ("layout", self.layout, LAYOUTS),
            ("grid", self.grid, GRIDS),
        ):
            if value not in allowed:
                found.append(f"{what} {value!r} is not one of {', '.join(allowed)}")
        if self.zero is not None:
            if self.grid != "symmetric":
                found.append(f"zero {self.zero} belongs to a symmetric grid, not {self.grid}")
            elif not 0 <= self.zero < 2**self.bits:
                found.append(f"zero {self.zero} is no code of {self.bits} bits")
        if self.grid == "mxfp4":
            if (self.bits, group, self.scale_bits) != MXFP4:
                found.append("grid mxfp4: it has bits 4, group 32 and scale_bits 8, no others")
        elif self.scale_bits is not None:
            if self.scale_bits not in SCALE_BITS:
                found.append(f"scale_bits {self.scale_bits} is not one of {SCALE_BITS}")
            if self.grid == "zero_point":
                found.append("scale_bits: two-level scales have no zero points")
            if isinstance(group, str) or BLOCK % group:
                found.append(f"scale_bits: group {group} does not divide a block of {BLOCK}")
        return found

    @property
    def is_float(self) -> bool:
        """Whether the weight is stored as floating numbers."""
        return self.group is None

    @property
    def is_contract(self) -> bool:
        """Whether codes and scales are those of CONTRACTS section 1's first formula."""
        return not self.is_float and (self.grid, self.zero, self.scale_bits) == (
            "symmetric",
            None,
            None,
        )

    @property
    def two_level(self) -> bool:
        """Whether scales are codes under block scales."""
        return self.scale_bits is not None and self.grid != "mxfp4"

    @property
    def zero_code(self) -> int:
        """The code of a symmetric grid that stands for 0."""
        return (1 << (self.bits - 1)) - 1 if self.zero is None else self.zero

    @property
    def top_code(self) -> int:
        """The largest code that a method may choose; the smallest is 0."""
        if self.grid == "symmetric" and self.zero is None:
            return 2 * self.zero_code
        return (1 << self.bits) - 1

    @property
    def scale_zero(self) -> int:
        """The scale code of a two-level format that stands for 0."""
        assert self.scale_bits is not None
        return 1 << (self.scale_bits - 1) if self.grid == "symmetric" else 0

    @property
    def sparse_words(self) -> bool:
        """Whether a word holds whole codes only, its top bits unused (3 bits, group 40)."""
        return (self.bits, self.group) == SPARSE

    def group_size(self, k: int) -> int:
        """Columns under one scale, in a row of k elements; the last group may be shorter."""
        assert self.group is not None, "a float format has no groups"
        return -(-k // UNIT) * UNIT if isinstance(self.group, str) else self.group

    def num_groups(self, k: int) -> int:
        """Groups in a row of k elements; a tail is padded to a whole group."""
        return -(-k // self.group_size(k))

    def num_blocks(self, k: int) -> int:
        """Blocks of a two-level format in a row of k elements."""
        return -(-k // BLOCK)

    def num_words(self, k: int) -> int:
        """uint32 words of the codes of a row of k elements, tail padded to a whole group."""
        codes = self.num_groups(k) * self.group_size(k)
        return codes // 10 if self.sparse_words else stream_words(codes, self.bits)

    def stored(self, n: int, k: int) -> tuple[StoredPart, ...]:
        """What a weight [n, k] is stored as, in the order of the parameters."""
        if self.is_float:
            return (StoredPart("weight", (n, k), self.dtype),)
        rows = 1 if self.group == "tensor" else n
        groups = self.num_groups(k)
        found = [("q_weight", n, self.num_words(k), "uint32")]
        if self.scale_bits is None:
            found.append(("q_scale", rows, groups, self.dtype))
            if self.grid == "asymmetric":
                found.append(("q_bias", rows, groups, self.dtype))
            elif self.grid == "zero_point":
                found.append(("q_zero", rows, stream_words(groups, self.bits), "uint32"))
        else:
            words, blocks = stream_words(groups, self.scale_bits), self.num_blocks(k)
            found.append(("q_scale", n, words, "uint32"))
            if self.grid == "asymmetric":
                found.append(("q_bias", n, words, "uint32"))
            if self.two_level:
                found.append(("q_block_scale", n, blocks, self.dtype))
            if self.grid == "asymmetric":
                found.append(("q_block_bias", n, blocks, self.dtype))
        order = -1 if self.layout == "KN" else 1
        return tuple(StoredPart(name, (a, b)[::order], dtype) for name, a, b, dtype in found)

    def as_dict(self) -> dict[str, int | str]:
        """The fields that are set, as an attribute of a PrimFunc or a JSON object."""
        fields: dict[str, int | str] = {"bits": self.bits, "dtype": self.dtype}
        if self.group is not None:
            fields["group"] = self.group
        fields["layout"] = self.layout
        if self.grid != "symmetric":
            fields["grid"] = self.grid
        if self.zero is not None:
            fields["zero"] = self.zero
        if self.scale_bits is not None:
            fields["scale_bits"] = self.scale_bits
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WeightFormat:
        """The inverse of `as_dict`; values may be TVM's boxed ints and strings."""
        group: Any = fields["group"] if "group" in fields else None
        if group is not None:
            group = str(group) if str(group) in ("row", "tensor") else int(group)
        return cls(
            int(fields["bits"]),
            str(fields["dtype"]),
            group,
            str(fields["layout"]),
            str(fields["grid"]) if "grid" in fields else "symmetric",
            int(fields["zero"]) if "zero" in fields else None,
            int(fields["scale_bits"]) if "scale_bits" in fields else None,
        )

    def bits_per_weight(self, n: int = 4096, k: int = 4096) -> float:
        """Stored bits a weight of a matrix [n, k], scales, tails and unused bits included."""
        return 8 * sum(part.nbytes for part in self.stored(n, k)) / (n * k)


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a weight: its name's suffix, shape and dtype."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


def mxfp4(dtype: str, layout: str = "NK") -> WeightFormat:
    """The OCP's MXFP4; `dtype`, of a scheme's other numbers, says nothing here."""
    bits, group, scale_bits = MXFP4
    return WeightFormat(bits, dtype, group, layout, "mxfp4", None, scale_bits)


def float_format(dtype: str) -> WeightFormat:
    """The format of a weight that is stored as numbers of `dtype`."""
    return WeightFormat(FLOAT_DTYPES[dtype], dtype)


def stream_words(count: int, bits: int) -> int:
    """uint32 words of a dense stream of `count` codes of `bits` bits, its tail padded with 0."""
    return -(-count * bits // 32)
