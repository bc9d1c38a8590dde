"""StoredWeights: the weights of an artifact as numbers, beside the originals they stand for.

The formats come from the artifact's qcc.json, names and shapes from the checkpoint's architecture,
so that nothing needs to know by which scheme, method or adapter the artifact was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.build import Plan, weight_specs
from qcc.compiler.read_model import read_model
from qcc.compiler.reference import Original
from qcc.compiler.sizes import Sizes
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.spec import INPUT_SCALE, WeightSpec
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import WeightFormat, float_format
from qcc.quant_schemes.packing import dequantize, in_layout
from qcc.quant_schemes.scheme import Scheme
from qcc.runtime.artifact import Artifact
from qcc.runtime.errors import QccError

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]  # numbers done, in all, name of the weight
BLOCK = 1 << 22  # numbers of a weight that are dequantized at a time


@dataclass(frozen=True)
class StoredWeights:
    """The weights of an artifact; `source` is their checkpoint."""

    artifact: Artifact
    source: Original
    plan: Plan
    specs: tuple[WeightSpec, ...]

    @classmethod
    def open(cls, artifact: Artifact, source: Original) -> StoredWeights:
        """Match an artifact with a checkpoint of the same architecture and sizes.

        Raises:
            QccError: they have other tensors.
        """
        try:
            plan = plan_of(artifact, source)
            specs = weight_specs(plan)
        except SchemeError as err:
            raise QccError(
                f"{artifact.folder} was not compiled from {source.folder}, which has not all of "
                f"its weights: {err}"
            ) from err
        for part in (part for spec in specs for part in spec.stored):
            record = artifact.records.get(part.name)
            if record is None or (record.shape, record.dtype) != (part.shape, part.dtype):
                found = f"{record.dtype}{list(record.shape)}" if record else "missing"
                raise QccError(
                    f"{artifact.folder} was not compiled from {source.folder}: {part.name!r} is "
                    f"{found}, of that model it would be {part.dtype}{list(part.shape)}"
                )
        return cls(artifact, source, plan, specs)

    def quantized(self) -> list[WeightSpec]:
        """The weights that are not stored as floating numbers."""
        return [spec for spec in self.specs if not spec.format.is_float]

    def dequantized(self, spec: WeightSpec) -> Floats:
        """f32[*shape]: the numbers that the stored parts of a weight stand for."""
        parts = self._parts(spec)
        out = np.empty(spec.shape, np.float32)
        if spec.format.is_float:
            out[...] = parts["weight"]
            return out
        n, k = spec.shape
        step = max(1, BLOCK // k)
        for row in range(0, n, step):
            out[row : row + step] = _rows(parts, spec.format, row, min(row + step, n), k)
        return out

    def original(self, spec: WeightSpec, checkpoint: Checkpoint) -> Floats:
        """f32[*shape]: a weight as the checkpoint has it, in our layout of rows."""
        read = [checkpoint.read(source.name).astype(np.float32) for source in spec.sources]
        whole = np.concatenate(read) if len(read) > 1 else read[0]
        if spec.transform is not None:
            whole = np.ascontiguousarray(spec.transform(whole))
        return whole

    def errors(self, progress: Progress | None = None) -> Iterator[tuple[WeightSpec, float]]:
        """(spec, ||W - W'|| / ||W||, Frobenius) of every quantized weight."""
        specs = self.quantized()
        total, done = sum(math.prod(spec.shape) for spec in specs), 0
        with self.source.open() as checkpoint:
            for spec in specs:
                original, ours = self.original(spec, checkpoint), self.dequantized(spec)
                yield spec, relative_error(original, ours)
                done += original.size
                if progress:
                    progress(done, total, spec.name)

    def by_source(self) -> dict[str, Floats]:
        """Our numbers under the checkpoint's names, as the original's program takes them."""
        found: dict[str, Floats] = {}
        for spec in self.specs:
            whole = self.dequantized(spec)
            if spec.transform is not None:
                # Where in the sources each element was.
                shape = spec.stacked_shape
                places = spec.transform(np.arange(math.prod(shape)).reshape(shape))
                if places.dtype.kind == "i":  # else it scales rows, and ours are what it makes
                    flat = np.full(math.prod(shape), np.nan, np.float32)
                    flat[places.reshape(-1)] = whole.reshape(-1)
                    whole = flat.reshape(shape)
            row = 0
            for source in spec.sources:
                numbers = np.ascontiguousarray(whole[row : row + source.shape[0]])
                if source.name in found:  # NaN where another weight has the numbers
                    numbers = np.where(np.isnan(numbers), found[source.name], numbers)
                found[source.name] = numbers
                row += source.shape[0]
        return found

    def _parts(self, spec: WeightSpec) -> dict[str, Array]:
        """Suffix -> stored array, rows first."""
        if spec.format.is_float:
            return {"weight": self.artifact.read(spec.name)}
        suffixes = [part.suffix for part in spec.format.stored(*spec.shape)]
        arrays = [self.artifact.read(part.name) for part in spec.numbers]
        return {
            suffix: in_layout(array, spec.format)
            for suffix, array in zip(suffixes, arrays, strict=True)
        }


def relative_error(original: Array, ours: Array) -> float:
    """||W - W'|| / ||W|| in f64; of a weight of zeros 0 where it is kept, else infinite."""
    norm = math.sqrt(_square(original))
    off = math.sqrt(_square(original - ours))
    return off / norm if norm else (math.inf if off else 0.0)


def plan_of(artifact: Artifact, source: Original) -> Plan:
    """The plan by which an artifact was made of a checkpoint: its formats, its sizes."""
    task = "embedding" if artifact.manifest.task == "embedding" else "generation"
    architecture, config, facts = read_model(source.folder, task, source.names())
    found = {
        name: fmt
        for name, fmt in _formats(artifact).items()
        if architecture.role(name, (1, 1)) != "float"  # a router's matrix takes no rule
    }
    # Norms and biases have it; scales of inputs are always f32.
    vectors = (
        record.dtype
        for name, record in artifact.records.items()
        if len(record.shape) == 1 and not name.endswith(INPUT_SCALE)
    )
    dtype = next(vectors, "float16")
    embedding = found.pop(architecture.embedding, float_format(dtype))
    lm_head = found.pop(architecture.lm_head, embedding)
    manifest = artifact.manifest
    rules = tuple(found.items())
    activations = manifest.activations
    scheme = Scheme(manifest.scheme, dtype, rules, embedding, lm_head, activations)
    try:
        sizes = Sizes(**manifest.sizes)
    except TypeError as err:
        raise QccError(f"{artifact.folder}: sizes of another version ({err})") from err
    return Plan(architecture, config, scheme, sizes, embedding=facts)


def _formats(artifact: Artifact) -> dict[str, WeightFormat]:
    """Names of matrices, as a scheme knows them -> their formats; others are floating."""
    found = {}
    for name, record in artifact.records.items():
        if len(record.shape) != 2 or not name.endswith((".q_weight", ".weight")):
            continue
        weight = name.removesuffix("q_weight") + "weight" if name.endswith("q_weight") else name
        found[weight] = WeightFormat.from_dict(artifact.manifest.tensors[name])
    return found


def _rows(parts: dict[str, Array], fmt: WeightFormat, start: int, stop: int, k: int) -> Floats:
    """Rows start..stop of a weight whose parts lie rows first; a row knows nothing of others."""
    part = {
        suffix: array[start:stop] if fmt.group != "tensor" or suffix == "q_weight" else array
        for suffix, array in parts.items()
    }
    return dequantize(part, replace(fmt, layout="NK"), stop - start, k)


def _square(array: Array) -> float:
    """The sum of squares, in f64, block by block."""
    flat = array.reshape(-1)
    return sum(
        float(np.square(flat[at : at + BLOCK].astype(np.float64)).sum())
        for at in range(0, flat.size, BLOCK)
    )
