"""convert_weights: checkpoint tensors -> the stored tensors of an artifact.

Each weight is read in blocks of rows, its sources one after another, quantized or cast, and
written; some blocks are under way at once, a few megabytes each. Beside these the memory holds the
packed weight where the layout is KN, and the whole weight where it has a transform or one scale.
What a calibration has quantized, or another tool, is written as it is given.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.weights import kernels
from qcc.compiler.weights.checkpoint import ITEMSIZE, Checkpoint
from qcc.compiler.weights.shards import ShardWriter
from qcc.compiler.weights.spec import INPUT_SCALE, WeightSpec
from qcc.quant_schemes.packing import in_layout, store
from qcc.quant_schemes.rounding import rtn
from qcc.quant_schemes.rounding.method import Method
from qcc.runtime.artifact import TensorRecord, tensor_bytes
from qcc.runtime.errors import QccError

Array = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]  # source bytes done, in all, name of the weight
# A weight -> its stored parts by suffix, in the format's layout; None: convert it.
Given = Callable[[WeightSpec], Mapping[str, Array] | None]
BLOCK_BYTES = 4 << 20  # of source numbers; large enough to hide the cost of a task
MAX_THREADS = 8
_LISTED = 5  # names in an error


@dataclass(frozen=True)
class _Block:
    """Rows of a weight: `read` gives them as [rows * k]; `source` names them in errors.

    `nbytes` is their share of the checkpoint, for the progress. `given`: the whole weight's parts,
    rows first; nothing is read then.
    """

    spec: WeightSpec
    source: str
    rows: int
    nbytes: int
    read: Callable[[], Array]
    given: tuple[Array, ...] | None = None


@dataclass(frozen=True)
class _Parts:
    """What a block was converted to: its stored parts in order, in layout NK."""

    block: _Block
    parts: tuple[Array, ...]


def convert_weights(
    checkpoint: Checkpoint,
    specs: Sequence[WeightSpec],
    out_dir: Path,
    progress: Progress | None = None,
    ignored: Sequence[str] = (),
    method: Method = rtn.METHOD,
    given: Given | None = None,
) -> list[TensorRecord]:
    """Fill `specs` from a checkpoint and write params_shard_N.bin and tensor-cache.json.

    Everything that names, shapes and dtypes can tell is checked before anything is written.

    Args:
        checkpoint: an open one.
        specs: the weights, in parameter order.
        out_dir: the artifact folder; an artifact that lies there is replaced at the end.
        progress: called after each block.
        ignored: wildcards of checkpoint tensors that no weight uses, harmlessly.
        method: chooses the codes, from the weights alone.
        given: what needs no converting.

    Returns:
        The records of the stored tensors, in parameter order.

    Raises:
        QccError: a tensor is missing, unused, of a wrong shape or dtype, NaN or infinite, or out of
            the range of its format; a scale of inputs is not given; the disk is full.
    """
    check_weights(checkpoint, specs, ignored)
    total = sum(_source_bytes(checkpoint, spec) for spec in specs)
    stored = sum(tensor_bytes(part.shape, part.dtype) for spec in specs for part in spec.stored)
    done = 0

    def advance(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total, name)

    threads = min(os.cpu_count() or 1, MAX_THREADS)
    with ThreadPoolExecutor(threads, "qcc-convert") as pool, ShardWriter(out_dir, stored) as writer:
        # Blocks of the next weight are under way while those of the last are written.
        blocks = _blocks(checkpoint, specs, given)
        converted = _converted(pool, 2 * threads, blocks, method)
        for spec in specs:
            _write(spec, converted, writer, advance)
        return writer.finish(sum(math.prod(spec.shape) for spec in specs))


def check_weights(
    checkpoint: Checkpoint, specs: Sequence[WeightSpec], ignored: Sequence[str]
) -> None:
    """Compare names, shapes and dtypes of a checkpoint with what `specs` need; reads no numbers.

    Raises:
        QccError: a tensor is missing, unused, of a wrong shape or dtype.
    """
    for spec in specs:
        for source in spec.sources:
            checkpoint.check(source.name, source.shape)
    used = {source.name for spec in specs for source in spec.sources}
    unused = [
        name
        for name in checkpoint.names
        if name not in used and not any(fnmatch.fnmatchcase(name, p) for p in ignored)
    ]
    if unused:
        names = ", ".join(map(repr, unused[:_LISTED]))
        more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
        raise QccError(
            f"{checkpoint.folder}: tensors that this architecture does not use: "
            f"{names}{more}; the model would not compute what its authors "
            "meant, so it is not compiled"
        )


def _source_bytes(checkpoint: Checkpoint, spec: WeightSpec) -> int:
    return sum(math.prod(s.shape) * ITEMSIZE[checkpoint.dtype(s.name)] for s in spec.sources)


def _converted(
    pool: ThreadPoolExecutor, ahead: int, blocks: Iterable[_Block], method: Method
) -> Iterator[_Parts]:
    """The parts of each block in order; up to `ahead` blocks are under way in the pool."""
    waiting: deque[Future[_Parts]] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(_convert, block, method))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _convert(block: _Block, method: Method) -> _Parts:
    """Read and compute; runs in the pool."""
    if block.given is not None:
        return _Parts(block, block.given)
    flat, fmt = block.read(), block.spec.format
    if fmt.is_float:
        result = kernels.cast(flat, fmt.dtype)
        _check_finite(result, flat, block)
        return _Parts(block, (result,))
    if method is rtn.METHOD and kernels.takes(fmt):
        words, scales = kernels.quantize(flat.reshape(block.rows, -1), fmt)
        # A NaN or an infinity among the weights is one in the scale of its group.
        _check_finite(scales, flat, block)
        return _Parts(block, (words, scales))
    _check_finite(flat, flat, block)
    rows = flat.reshape(block.rows, -1).astype(np.float32)
    parts = store(method.quantize(rows, fmt, None), replace(fmt, layout="NK"))
    for part in parts.values():
        if part.dtype != np.uint32:
            _check_finite(part, flat, block)
    return _Parts(block, tuple(parts.values()))


def _write(
    spec: WeightSpec,
    converted: Iterator[_Parts],
    writer: ShardWriter,
    advance: Callable[[int, str], None],
) -> None:
    """Take the blocks of one weight, the next in `converted`, and write its stored tensors."""
    n, _ = _matrix(spec)
    later: list[tuple[Array, ...]] = []  # the parts of each block but the first

    def first_parts() -> Iterator[tuple[int, Array]]:
        row = 0
        while row < n:
            done = next(converted)
            later.append(done.parts[1:])
            yield row, done.parts[0]
            row += done.block.rows
            advance(done.block.nbytes, spec.name)

    first, *others = spec.stored
    if spec.format.is_float or spec.format.layout == "NK":
        writer.add(first, (part for _, part in first_parts()))
        for index, stored in enumerate(others):
            writer.add(stored, [parts[index] for parts in later])
        return
    packed = np.empty(first.shape, np.uint32)  # [words, n]
    for row, words in first_parts():
        packed[:, row : row + len(words)] = words.T
    writer.add(first, [packed])
    for index, stored in enumerate(others):
        rows = np.concatenate([parts[index] for parts in later])
        writer.add(stored, [in_layout(rows, spec.format)])


def _matrix(spec: WeightSpec) -> tuple[int, int]:
    """The weight as rows and columns; a vector has rows of one number."""
    k = math.prod(spec.shape[1:])
    return math.prod(spec.shape) // k, k


def _blocks(
    checkpoint: Checkpoint, specs: Iterable[WeightSpec], given: Given | None
) -> Iterator[_Block]:
    for spec in specs:
        parts = given(spec) if given is not None else None
        if spec.input_scale and INPUT_SCALE not in (parts or {}):
            raise QccError(
                f"{spec.name}: a scheme with activations: static needs the scale of its inputs, "
                "which no calibration text has told; use a scheme with activations: dynamic"
            )
        if parts is not None:
            yield _given_block(checkpoint, spec, parts)
            continue
        whole = spec.transform is not None or spec.format.group == "tensor"
        yield from (_whole_blocks if whole else _source_blocks)(checkpoint, spec)


def _given_block(checkpoint: Checkpoint, spec: WeightSpec, parts: Mapping[str, Array]) -> _Block:
    """All rows of a weight that is already converted."""
    n, _ = _matrix(spec)
    if spec.format.is_float:
        rows = [parts["weight"]]
    else:
        suffixes = [part.suffix for part in spec.format.stored(*spec.shape)]
        suffixes += [INPUT_SCALE] if spec.input_scale else []
        rows = [in_layout(parts[suffix], spec.format) for suffix in suffixes]
    for stored, part in zip(spec.stored, rows, strict=True):
        assert part.dtype.name == stored.dtype, f"{stored.name}: given as {part.dtype}"
    nbytes = _source_bytes(checkpoint, spec)
    return _Block(spec, spec.name, n, nbytes, lambda: rows[0], tuple(rows))


def _source_blocks(checkpoint: Checkpoint, spec: WeightSpec) -> Iterator[_Block]:
    """Blocks of rows, source after source."""
    _, k = _matrix(spec)
    for source in spec.sources:
        rows = math.prod(source.shape) // k
        row_bytes = k * ITEMSIZE[checkpoint.dtype(source.name)]
        step = max(1, BLOCK_BYTES // row_bytes)
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            nbytes = (stop - row) * row_bytes

            def read(
                name: str = source.name, at: int = row * k, end: int = stop * k, size: int = nbytes
            ) -> Array:
                buffer = kernels.aligned_empty((size,), np.uint8)
                return checkpoint.read_flat(name, at, end, buffer)

            yield _Block(spec, source.name, stop - row, nbytes, read)


def _whole_blocks(checkpoint: Checkpoint, spec: WeightSpec) -> Iterator[_Block]:
    """Blocks of rows of the whole weight, after its transform; one block for one scale."""
    parts = [checkpoint.read(source.name) for source in spec.sources]
    nbytes = sum(part.nbytes for part in parts)
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(np.float32) for part in parts]
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    del parts
    if spec.transform is not None:
        whole = np.ascontiguousarray(spec.transform(whole))
    assert whole.shape == spec.shape, f"{spec.name}: transform made {whole.shape} of {spec.shape}"
    flat, (rows, k) = whole.reshape(-1), _matrix(spec)
    step = max(1, BLOCK_BYTES // (k * whole.itemsize))
    if spec.format.group == "tensor":
        step = rows
    names = ", ".join(source.name for source in spec.sources)
    for row in range(0, rows, step):
        stop = min(row + step, rows)

        def read(start: int = row * k, end: int = stop * k) -> Array:
            return flat[start:end]

        share = nbytes * stop // rows - nbytes * row // rows
        yield _Block(spec, names, stop - row, share, read)


def _check_finite(result: Array, flat: Array, block: _Block) -> None:
    """Refuse a block whose result is not finite, saying why."""
    if kernels.all_finite(result):
        return
    if not kernels.all_finite(flat):
        raise QccError(
            f"tensor {block.source!r} of the checkpoint holds NaN or infinite numbers; it is "
            "damaged: download the model again"
        )
    top = float(np.abs(flat.astype(np.float32)).max())
    raise QccError(
        f"tensor {block.source!r}: {top:g} is beyond the range of {block.spec.format.dtype} "
        f"(65504); choose a scheme whose name says bf16 or f32, as q4f32_1"
    )
