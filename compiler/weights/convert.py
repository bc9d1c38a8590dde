"""convert_weights: checkpoint tensors -> the stored tensors of an artifact.

Each weight is read in blocks of rows, its sources one after another, quantized or cast, and
written; several blocks are under way at once in threads. Held in memory are these blocks, plus the
packed weight where the layout is KN, plus the whole weight where it has a transform.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.weights import kernels
from qcc.compiler.weights.checkpoint import ITEMSIZE, Checkpoint
from qcc.compiler.weights.shards import ShardWriter
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.packing import in_layout
from qcc.runtime.artifact import TensorRecord, tensor_bytes
from qcc.runtime.errors import QccError

Array = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]  # source bytes done, in all, name of the weight
BLOCK_BYTES = 4 << 20  # of source numbers; large enough to hide the cost of a task
MAX_THREADS = 8
_LISTED = 5  # names in an error


@dataclass(frozen=True)
class _Block:
    """Rows of a weight: `read` gives them as [rows * k]; `source` names them in errors.

    `nbytes` is their share of the checkpoint, for the progress.
    """

    source: str
    rows: int
    nbytes: int
    read: Callable[[], Array]


def convert_weights(
    checkpoint: Checkpoint,
    specs: Sequence[WeightSpec],
    out_dir: Path,
    progress: Progress | None = None,
    ignored: Sequence[str] = (),
) -> list[TensorRecord]:
    """Fill `specs` from a checkpoint and write params_shard_N.bin and tensor-cache.json.

    Everything that names, shapes and dtypes can tell is checked before anything is written.

    Args:
        checkpoint: an open one.
        specs: the weights, in parameter order.
        out_dir: the artifact folder; an artifact that lies there is replaced at the end.
        progress: called after each block.
        ignored: wildcards of checkpoint tensors that no weight uses, harmlessly.

    Returns:
        The records of the stored tensors, in parameter order.

    Raises:
        QccError: a tensor is missing, unused, of a wrong shape or dtype, NaN or infinite, or out of
            the range of its format; the disk is full.
    """
    _check(checkpoint, specs, ignored)
    sources = [source for spec in specs for source in spec.sources]
    total = sum(math.prod(s.shape) * ITEMSIZE[checkpoint.dtype(s.name)] for s in sources)
    stored = sum(tensor_bytes(part.shape, part.dtype) for spec in specs for part in spec.stored)
    done = 0

    def advance(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total, name)

    threads = min(os.cpu_count() or 1, MAX_THREADS)
    with ThreadPoolExecutor(threads, "qcc-convert") as pool, ShardWriter(out_dir, stored) as writer:
        for spec in specs:
            _convert(checkpoint, spec, writer, _Window(pool, 2 * threads), advance)
        return writer.finish(sum(math.prod(spec.shape) for spec in specs))


def _check(checkpoint: Checkpoint, specs: Sequence[WeightSpec], ignored: Sequence[str]) -> None:
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
        more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
        raise QccError(
            f"{checkpoint.folder}: tensors that this architecture does not use: "
            f"{', '.join(unused[:_LISTED])}{more}; the model would not compute what its authors "
            "meant, so it is not compiled"
        )


class _Window:
    """Runs tasks in a pool and yields their results in order, a bounded number ahead."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: int) -> None:
        self.pool = pool
        self.ahead = ahead

    def map(self, task: Callable[[_Block], Any], blocks: Iterable[_Block]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        try:
            for block in blocks:
                waiting.append(self.pool.submit(task, block))
                if len(waiting) >= self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _convert(
    checkpoint: Checkpoint,
    spec: WeightSpec,
    writer: ShardWriter,
    window: _Window,
    advance: Callable[[int, str], None],
) -> None:
    """Write the stored tensors of one weight."""
    k = 1 if len(spec.shape) < 2 else math.prod(spec.shape[1:])
    if spec.transform is None:
        blocks = _source_blocks(checkpoint, spec, k)
    else:
        blocks = _transformed_blocks(checkpoint, spec, k)
    fmt = spec.format

    if fmt.is_float:

        def cast(block: _Block) -> tuple[int, Array]:
            flat = block.read()
            result = kernels.cast(flat, fmt.dtype)
            _check_finite(result, flat, spec, block.source)
            return block.nbytes, result

        def chunks() -> Iterator[Array]:
            for nbytes, result in window.map(cast, blocks):
                yield result
                advance(nbytes, spec.name)

        writer.add(spec.stored[0], chunks())
        return

    def quantize(block: _Block) -> tuple[int, Array, Array]:
        flat = block.read()
        words, scales = kernels.quantize(flat.reshape(block.rows, k), fmt)
        # A NaN or an infinity among the weights is one in the scale of its group.
        _check_finite(scales, flat, spec, block.source)
        return block.nbytes, words, scales

    scale_rows: list[Array] = []

    def word_rows() -> Iterator[Array]:
        for nbytes, words, scales in window.map(quantize, blocks):
            scale_rows.append(scales)
            yield words
            advance(nbytes, spec.name)

    words_of, scales_of = spec.stored
    if fmt.layout == "NK":
        writer.add(words_of, word_rows())
        writer.add(scales_of, scale_rows)
        return
    packed = np.empty(words_of.shape, np.uint32)  # [words, n]
    row = 0
    for words in word_rows():
        packed[:, row : row + len(words)] = words.T
        row += len(words)
    writer.add(words_of, [packed])
    writer.add(scales_of, [in_layout(np.concatenate(scale_rows), fmt)])


def _source_blocks(checkpoint: Checkpoint, spec: WeightSpec, k: int) -> Iterator[_Block]:
    """Blocks of rows, source after source."""
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

            yield _Block(source.name, stop - row, nbytes, read)


def _transformed_blocks(checkpoint: Checkpoint, spec: WeightSpec, k: int) -> Iterator[_Block]:
    """Blocks of rows of the whole weight, after its transform."""
    assert spec.transform is not None
    parts = [checkpoint.read(source.name) for source in spec.sources]
    nbytes = sum(part.nbytes for part in parts)
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(np.float32) for part in parts]
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    del parts
    whole = np.ascontiguousarray(spec.transform(whole))
    assert whole.shape == spec.shape, f"{spec.name}: transform made {whole.shape} of {spec.shape}"
    flat = whole.reshape(-1)
    step = max(1, BLOCK_BYTES // (k * whole.itemsize))
    names = ", ".join(source.name for source in spec.sources)
    rows = flat.size // k
    for row in range(0, rows, step):
        stop = min(row + step, rows)

        def read(start: int = row * k, end: int = stop * k) -> Array:
            return flat[start:end]

        share = nbytes * stop // rows - nbytes * row // rows
        yield _Block(names, stop - row, share, read)


def _check_finite(result: Array, flat: Array, spec: WeightSpec, source: str) -> None:
    """Refuse a block whose result is not finite, saying why."""
    if kernels.all_finite(result):
        return
    if not kernels.all_finite(flat):
        raise QccError(
            f"tensor {source!r} of the checkpoint holds NaN or infinite numbers; it is damaged: "
            "download the model again"
        )
    top = float(np.abs(flat.astype(np.float32)).max())
    raise QccError(
        f"tensor {source!r}: {top:g} is beyond the range of {spec.format.dtype} "
        f"(65504); choose a scheme whose name says bf16 or f32, as q4f32_1"
    )
