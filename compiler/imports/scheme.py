"""source_scheme: the formats that an imported checkpoint already has, as a Scheme.

It is what `compile` uses where no --quant is given and the checkpoint has a `label`: codes are
kept, floating tensors keep their dtype, and what no format represents gets one of as many bits.
"""

from __future__ import annotations

import fnmatch
import re

import numpy as np

from qcc.compiler.models.architecture import Architecture
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.quant_schemes.format import WeightFormat, float_format
from qcc.quant_schemes.scheme import Scheme


def source_scheme(checkpoint: Checkpoint, architecture: Architecture) -> Scheme:
    """The scheme of an imported checkpoint: a rule for each matrix, by its name.

    Norms and biases are stored as float16 where that is exact, else as float32.
    """
    tables = (architecture.embedding, architecture.lm_head)
    formats: dict[str, WeightFormat] = {}
    exact = True
    for name in checkpoint.names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in architecture.ignored):
            continue
        if len(checkpoint.shape(name)) == 2:
            formats[name] = _format(checkpoint, name)
        elif checkpoint.dtype(name) != "float16":
            exact = exact and _fits_float16(checkpoint, name)
    dtype = "float16" if exact else "float32"
    embedding = formats.get(tables[0], float_format(dtype))
    rules = [(_escaped(name), fmt) for name, fmt in formats.items() if name not in tables]
    return Scheme(
        name=checkpoint.label,
        dtype=dtype,
        rules=tuple(rules),
        embedding=embedding,
        lm_head=formats.get(tables[1], embedding),
        description="the formats of the imported checkpoint",
    )


def _format(checkpoint: Checkpoint, name: str) -> WeightFormat:
    origin = checkpoint.origin(name)
    found = origin.format or origin.near if origin is not None else None
    return found or float_format(checkpoint.dtype(name))


def _fits_float16(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a vector's numbers survive float16."""
    numbers = checkpoint.read(name).astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((numbers.astype(np.float16).astype(np.float32) == numbers).all())


def _escaped(name: str) -> str:
    """A wildcard that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
