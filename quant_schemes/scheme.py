"""WeightFormat and Scheme: which numbers a weight is stored as, as data.

A scheme file maps shell wildcards on weight names to formats; see schemes/q4f16_1.yaml. Activations
and kernels are not its business: a target decides how to compute with a format.
"""

from __future__ import annotations

import fnmatch
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qcc.quant_schemes.errors import SchemeError, did_you_mean

SCHEME_DIR = Path(__file__).parent / "schemes"
FLOAT_DTYPES = {"float32": 32, "float16": 16, "bfloat16": 16}
CODE_BITS = (3, 4, 8)
MAX_GROUP = 65536  # more than any row of a released model has
# Never quantized, whatever a rule says: their bytes are few and their errors are not.
FLOATING_SUFFIXES = (".bias",)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix [n, k] (out, in) is stored.

    A float format (`bits` 16 or 32) stores `name.weight` in `dtype` and has no group. A quantized
    one stores codes of `bits` bits, symmetric and offset-encoded (CONTRACTS: M = 2^(bits-1) - 1,
    code 0..2M), one scale in `dtype` for each `group` codes along k. `layout` NK stores [n, ...],
    KN the transposes.
    """

    bits: int
    dtype: str
    group: int | None = None
    layout: str = "NK"

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
        if self.bits not in CODE_BITS:
            raise SchemeError(f"format: {self.bits} bits; quantized formats have {CODE_BITS}")
        if self.group <= 0 or self.group % self.codes_per_word:
            raise SchemeError(
                f"format: group {self.group} is not a multiple of the {self.codes_per_word} codes "
                f"of {self.bits} bits in a word"
            )
        if self.group > MAX_GROUP:
            raise SchemeError(f"format: group {self.group}; the largest is {MAX_GROUP}")
        if self.layout not in ("NK", "KN"):
            raise SchemeError(f"format: layout {self.layout!r} is not one of NK, KN")

    @property
    def is_float(self) -> bool:
        """Whether the weight is stored as floating numbers."""
        return self.group is None

    @property
    def codes_per_word(self) -> int:
        """Codes in one uint32 word; 3 bits leave the top 2 bits unused."""
        return 32 // self.bits

    @property
    def max_code(self) -> int:
        """M: a code q stands for (q - M) * scale."""
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, k: int) -> int:
        """Scales in a row of k elements; a tail is padded to a whole group."""
        assert self.group is not None
        return -(-k // self.group)

    def num_words(self, k: int) -> int:
        """uint32 words in a row of k elements, tail padded to a whole group."""
        assert self.group is not None
        return self.num_groups(k) * (self.group // self.codes_per_word)

    def stored(self, n: int, k: int) -> tuple[StoredPart, ...]:
        """What a weight [n, k] is stored as, in the order of the parameters."""
        if self.is_float:
            return (StoredPart("weight", (n, k), self.dtype),)
        words, scales = (n, self.num_words(k)), (n, self.num_groups(k))
        if self.layout == "KN":
            words, scales = words[::-1], scales[::-1]
        return (
            StoredPart("q_weight", words, "uint32"),
            StoredPart("q_scale", scales, self.dtype),
        )

    def as_dict(self) -> dict[str, int | str]:
        """The fields that are set, as an attribute of a PrimFunc or a JSON object."""
        fields: dict[str, int | str] = {"bits": self.bits, "dtype": self.dtype}
        if self.group is not None:
            fields["group"] = self.group
        return {**fields, "layout": self.layout}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WeightFormat:
        """The inverse of `as_dict`; values may be TVM's boxed ints and strings."""
        group = fields["group"] if "group" in fields else None
        return cls(
            int(fields["bits"]),
            str(fields["dtype"]),
            None if group is None else int(group),
            str(fields["layout"]),
        )

    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales included, tails aside."""
        if self.group is None:
            return float(self.bits)
        return 32 / self.codes_per_word + FLOAT_DTYPES[self.dtype] / self.group


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a weight: its name's suffix, shape and dtype."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = {"uint32": 4, "float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Scheme:
    """A name, the dtype of what stays floating, and the rules weight name -> WeightFormat.

    `rules` are tried in order, the first whose wildcard matches the weight's name (as
    `model.layers.0.mlp.down_proj.weight`) wins; a weight that none matches stays floating.
    `embedding` and `lm_head` are for those two weights, whatever the model calls them.
    """

    name: str
    dtype: str
    rules: tuple[tuple[str, WeightFormat], ...]
    embedding: WeightFormat
    lm_head: WeightFormat

    @cached_property
    def float_format(self) -> WeightFormat:
        """The format of every weight that is not quantized."""
        return WeightFormat(FLOAT_DTYPES[self.dtype], self.dtype)

    def format_of(self, name: str, *, role: str, ndim: int = 2) -> WeightFormat:
        """The format of weight `name`; `role` is "embedding", "lm_head", "linear" or "float".

        Only matrices are quantized: norms, biases and anything of role "float" stay floating.
        """
        if role == "float" or ndim != 2 or name.endswith(FLOATING_SUFFIXES):
            return self.float_format
        if role == "embedding":
            return self.embedding
        if role == "lm_head":
            return self.lm_head
        for pattern, fmt in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                return fmt
        return self.float_format


_FORMAT_KEYS = {"bits", "group", "layout"}
_SCHEME_KEYS = {"dtype", "linear", "embedding", "lm_head", "rules", "description"}


def list_schemes() -> list[str]:
    """Names of the shipped schemes, sorted."""
    return sorted(path.stem for path in SCHEME_DIR.glob("*.yaml"))


def load_scheme(name_or_path: str) -> Scheme:
    """Read a shipped scheme by name, or a user's YAML file by path.

    Raises:
        SchemeError: unknown name, unreadable YAML, unknown key, impossible format.
    """
    path = SCHEME_DIR / f"{name_or_path}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_]+", name_or_path) or not path.is_file():
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            hint = did_you_mean(name_or_path, list_schemes())
            raise SchemeError(
                f"--quant: unknown scheme {name_or_path!r}{hint}; "
                f"shipped: {', '.join(list_schemes())}; or a path to a .yaml file"
            )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise SchemeError(f"--quant: cannot read {path}: {err.strerror}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        # ValueError: not UTF-8, a date 2001-99-99, an integer of 5000 digits.
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise SchemeError(f"--quant: {path} is not readable as YAML: {first}") from err
    return parse_scheme(path.stem, data, where=str(path))


def parse_scheme(name: str, data: Any, where: str) -> Scheme:
    """Build a Scheme from the mapping that a YAML file holds; `where` begins every error."""
    if not isinstance(data, dict):
        raise SchemeError(f"{where}: a scheme is a mapping with the keys {sorted(_SCHEME_KEYS)}")
    _check_keys(data, _SCHEME_KEYS, where)
    dtype = data.get("dtype")
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise SchemeError(f"{where}: dtype is {_shown(dtype)}, allowed: {', '.join(FLOAT_DTYPES)}")
    linear = _parse_format(data.get("linear", "float"), dtype, f"{where}: linear")
    rules = data.get("rules", {})
    if not isinstance(rules, dict):
        raise SchemeError(f"{where}: rules maps wildcards on weight names to formats")
    parsed = [
        (_pattern(key, where), _parse_format(value, dtype, f"{where}: rules[{_shown(key)}]"))
        for key, value in rules.items()
    ]
    return Scheme(
        name=name,
        dtype=dtype,
        rules=(*parsed, ("*", linear)),
        embedding=_parse_format(data.get("embedding", "float"), dtype, f"{where}: embedding"),
        lm_head=_parse_format(data.get("lm_head", "float"), dtype, f"{where}: lm_head"),
    )


def _check_keys(data: dict[Any, Any], known: set[str], where: str) -> None:
    for key in data:
        if key not in known:
            hint = did_you_mean(key, known) if isinstance(key, str) else ""
            raise SchemeError(
                f"{where}: unknown key {_shown(key)}{hint}; allowed: {', '.join(sorted(known))}"
            )


def _parse_format(value: Any, dtype: str, where: str) -> WeightFormat:
    """`float`, or a mapping {bits, group, layout}; scales are in the scheme's dtype."""
    if value == "float":
        return WeightFormat(FLOAT_DTYPES[dtype], dtype)
    if not isinstance(value, dict):
        raise SchemeError(
            f"{where}: {_shown(value)} is neither 'float' nor a mapping bits, group, layout"
        )
    _check_keys(value, _FORMAT_KEYS, where)
    for key in ("bits", "group"):
        number = value.get(key)
        if type(number) is not int or abs(number) > MAX_GROUP:
            raise SchemeError(
                f"{where}: {key} is {_shown(number)}, it must be a whole number, at most "
                f"{MAX_GROUP}"
            )
    layout = value.get("layout", "NK")
    if not isinstance(layout, str):
        raise SchemeError(f"{where}: layout {_shown(layout)} is not one of NK, KN")
    try:
        return WeightFormat(value["bits"], dtype, value["group"], layout)
    except SchemeError as err:
        raise SchemeError(f"{where}: {err}") from err


def _pattern(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise SchemeError(f"{where}: rules[{_shown(key)}] is no wildcard on weight names")
    return key


def _shown(value: Any) -> str:
    """A value as an error quotes it: one short line, also of a YAML that nests by aliases."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
