"""Method: one way to choose codes, and what calibration may tell it of a layer's inputs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcc.quant_schemes.errors import SchemeError, did_you_mean
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Quantized

# Files of this folder that are no method.
SHARED = ("grid", "group_kernels", "groups", "method", "mxfp4")


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs x[k] on calibration text: means over `count` tokens.

    `square` f32[k] is the mean of x^2, `absolute` f32[k] of |x|, `hessian` f32[k, k] of x x^T,
    empty where it is not asked for. The inputs are those that the layers before, already quantized,
    make; `cross` f32[k, k], where it is asked for, is the mean of x y^T with y[k] the inputs of the
    original model in x's places.
    """

    count: int
    square: Array
    absolute: Array
    hessian: Array
    cross: Array | None = None


@dataclass(frozen=True)
class Method:
    """`quantize` chooses codes for f32[n, k]; its inputs are None where `needs_text` is False.

    `scales`, of a method that has it, chooses factors f32[k] for the columns of all weights that
    share an input, before they are quantized; what makes that input is divided by them.
    `hessian`, `original`: it wants `Inputs.hessian`, `Inputs.cross`.
    """

    description: str
    quantize: Callable[[Array, WeightFormat, Inputs | None], Quantized]
    needs_text: bool = False
    scales: Callable[[Sequence[Array], Sequence[WeightFormat], Inputs], Array] | None = None
    hessian: bool = True
    original: bool = False


def list_methods() -> list[str]:
    """Names of the methods, sorted: the files of this folder that define METHOD."""
    package = importlib.import_module("qcc.quant_schemes.rounding")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [name for name in names if name not in SHARED]


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        SchemeError: no such method.
    """
    if name not in list_methods():
        raise SchemeError(
            f"--method: unknown method {name!r}{did_you_mean(name, list_methods())}; "
            f"allowed: {', '.join(list_methods())}"
        )
    found: Method = importlib.import_module(f"qcc.quant_schemes.rounding.{name}").METHOD
    return found
