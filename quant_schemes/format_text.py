"""What a user writes for a WeightFormat: FORMAT on the command line, a text or mapping in YAML.

float                 not quantized
4/32   4/row 8/tensor bits/group, symmetric, the contract's grid
4/64a                 asymmetric: a scale and a bias for each group
3/16k  4/32k          asymmetric with two-level scales: of 6 bits from 4 bits and group 32 on,
                      else of 4; 2/32k6: of as many as named
4/32s                 symmetric with two-level scales of either sign, which use all codes
mxfp4                 4-bit floats under a power of two for each 32 columns, as gpt-oss has them
q8f16_1               as the linear layers of a shipped scheme without other rules
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from qcc.quant_schemes.errors import SchemeError, did_you_mean
from qcc.quant_schemes.format import MAX_GROUP, WeightFormat, float_format, mxfp4

FORMAT_HELP = "FORMAT: bits/group as 4/32, 4/64a (asymmetric), 2/16k (two-level), 8/row; mxfp4; a "
FORMAT_HELP += "uniform scheme as q8f16_1; or float"
_TEXT = re.compile(r"(\d)/(\d{1,5}|row|tensor)(a|[ks]\d?)?", re.ASCII)
_KEYS = {"bits", "group", "layout", "grid", "zero", "scale_bits", "dtype"}


def default_scale_bits(bits: int, group: int) -> int:
    """Bits of a two-level format's scales: of 2 and 3 bits finer ones are not worth their bits."""
    return 4 if bits <= 3 or group <= 16 else 6


def format_of_text(
    text: str, dtype: str, where: str, scheme_format: Callable[[str], WeightFormat | None]
) -> WeightFormat:
    """Parse FORMAT; scales are in `dtype` unless a scheme's name says otherwise.

    Args:
        text: what the user wrote.
        dtype: of the scheme that the format is for.
        where: begins every error.
        scheme_format: name of a scheme -> the format of its linear layers, None: no such.

    Raises:
        SchemeError: not a FORMAT, or a format that cannot be.
    """
    if text == "float":
        return float_format(dtype)
    if text == "mxfp4":
        return mxfp4(dtype)
    found = _TEXT.fullmatch(text)
    if not found:
        named = scheme_format(text)
        if named is None:
            raise SchemeError(f"{where}: {shown(text)} is no {FORMAT_HELP}")
        return named
    bits, group, kind = found.groups()
    fields: dict[str, Any] = {"bits": int(bits), "group": group}
    if group.isdigit():
        fields["group"] = int(group)
    if kind:
        if kind[0] == "s":
            fields["zero"] = 2 ** (int(bits) - 1)
        else:
            fields["grid"] = "asymmetric"
        if kind[0] in "ks":
            default = default_scale_bits(int(bits), int(group) if group.isdigit() else 0)
            fields["scale_bits"] = int(kind[1:] or default)
    return format_of_dict(fields, dtype, where)


def format_of_dict(value: Any, dtype: str, where: str) -> WeightFormat:
    """A mapping {bits, group, layout, grid, zero, scale_bits, dtype} of a scheme file.

    Raises:
        SchemeError: not such a mapping, or a format that cannot be.
    """
    if not isinstance(value, Mapping):
        raise SchemeError(
            f"{where}: {shown(value)} is neither 'float' nor a mapping bits, group, layout nor a "
            f"{FORMAT_HELP}"
        )
    for key in value:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS) if isinstance(key, str) else ""
            raise SchemeError(
                f"{where}: unknown key {shown(key)}{hint}; allowed: {', '.join(sorted(_KEYS))}"
            )
    for key in ("bits", "group", "zero", "scale_bits"):
        number = value.get(key)
        if key == "group" and number in ("row", "tensor"):
            continue
        if key not in value and key in ("zero", "scale_bits"):
            continue
        if type(number) is not int or abs(number) > MAX_GROUP:
            raise SchemeError(
                f"{where}: {key} is {shown(number)}, it must be a whole number, at most {MAX_GROUP}"
            )
    texts = {"layout": "NK", "grid": "symmetric", "dtype": dtype}
    for key, default in texts.items():
        texts[key] = value.get(key, default)
        if not isinstance(texts[key], str):
            raise SchemeError(f"{where}: {key} {shown(texts[key])} is no text")
    try:
        return WeightFormat(
            value["bits"],
            texts["dtype"],
            value["group"],
            texts["layout"],
            texts["grid"],
            value.get("zero"),
            value.get("scale_bits"),
        )
    except SchemeError as err:
        raise SchemeError(f"{where}: {err}") from err


def shown(value: Any) -> str:
    """A value as an error quotes it: one short line, also of a YAML that nests by aliases."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_of(fmt: WeightFormat) -> str:
    """A format in few letters, as FORMAT: float, mxfp4, 4/32, 3/32a, 2/16k; z: zero points."""
    if fmt.is_float:
        return "float"
    if fmt.grid == "mxfp4":
        return "mxfp4"
    kind = {"asymmetric": "a", "zero_point": "z"}.get(fmt.grid, "")
    if fmt.scale_bits is not None:
        assert isinstance(fmt.group, int)
        usual = fmt.scale_bits == default_scale_bits(fmt.bits, fmt.group)
        letter = "k" if fmt.grid == "asymmetric" else "s"
        kind = letter if usual else f"{letter}{fmt.scale_bits}"
    return f"{fmt.bits}/{fmt.group}{kind}"
