"""A compiled library: its functions, its metadata, its KV cache. No weights, no policy.

Sequence ids are non-negative integers. TVM fails midway through a run that exceeds a bound of the
library, so whoever calls checks tokens, batch and pages first.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.device import HOST, Device
from qcc.runtime.engine.metadata import Metadata
from qcc.runtime.engine.state import RecurrentState
from qcc.runtime.errors import QccError

POOLED_ALLOCATOR = 2
STATE = (
    *("add_sequence", "remove_sequence", "fork_sequence", "popn", "clear"),
    *("begin_forward", "end_forward"),
)
Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]


class Library:
    """The virtual machine of one library on one device."""

    def __init__(self, path: Path, device: Device = HOST) -> None:
        """Load the shared library, to run on `device`, and read its metadata.

        Raises:
            QccError: it does not load here, or another version of qcc made it.
        """
        self.path, self.device = path, device
        self.ffi = tvm_runtime.load()
        try:
            # Kept: the functions live in the module's code.
            self._module = _load_module(self.ffi, path)
            self.vm = self._start()
            text = str(self.vm["_metadata"]())
        except (AttributeError, RuntimeError, OSError, ValueError) as err:
            raise QccError(
                f"{path}: does not load ({_last_line(err)}); compile the model on or for this "
                "machine (qcc compile --target cpu)"
            ) from err
        self.metadata = Metadata.parse(text, str(path))
        self._reshape = tvm_runtime.global_function("vm.builtin.reshape")
        self.params: Any = None

    def _start(self) -> Any:
        vm = self._module["vm_load_executable"]()
        devices = [self.device] if self.device.is_host else [self.device, HOST]
        kinds = [(each.type, each.index, POOLED_ALLOCATOR) for each in devices]
        vm["vm_initialization"](*(number for kind in kinds for number in kind))
        return vm

    @contextmanager
    def watched(self, instrument: Callable[..., int]) -> Iterator[None]:
        """Within, TVM calls instrument(function, name, before, result, *arguments) around each call
        that a compiled function makes.

        On a virtual machine of its own: no instrument can be taken off again.
        """
        usual, self.vm = self.vm, self._start()
        try:
            self.vm["set_instrument"](self.ffi.convert(instrument))
            yield
        finally:
            self.vm = usual

    def choose_kv(self, kv: str | None, default: str, tiles: bool) -> None:
        """Choose how caches keep keys and values, before `bind`; None: by default, if there is one.

        Args:
            kv: f32, f16 or int8.
            default: likewise.
            tiles: the process may use tile registers, and attention need not be exact.

        Raises:
            QccError: the library has no such cache.
        """
        known = self.metadata.kv_names
        kv = kv or (default if default in known else known[0])
        self.metadata = self.metadata.with_kv(kv, tiles)

    def bind(self, slots: Sequence[Any]) -> None:
        """Set the packed parameter tuple: tensors in the order of `metadata.slots`, then what was
        chosen."""
        chosen = {"kv": self.metadata.kv_storage.query_heads}
        extents = [np.zeros(chosen[name], np.uint8) for name in self.metadata.extents]
        self.params = self.ffi.convert([*slots, *map(self.ffi.from_dlpack, extents)])

    def repack(self, name: str, stored: Sequence[Any]) -> Any:
        """The slot that function `name` makes of stored tensors."""
        return self.vm[name](*stored)

    def embed(self, tokens: Tokens) -> Any:
        """int32[n] -> the hidden states [n, H], a tensor of TVM."""
        return self.vm["embed"](self._tensor(tokens), self.params)

    def prefill(self, tokens: Tokens, cache: KVCache) -> Floats:
        """int32[n] of one sequence -> logits f32[1, V] after the last token."""
        return self._run("prefill", self.embed(tokens), (1, len(tokens)), cache)

    def batch_prefill(self, tokens: Tokens, positions: Tokens, cache: KVCache) -> Floats:
        """int32[n], sequences one behind the other -> logits f32[b, V] at `positions` int32[b]."""
        hidden = self.embed(tokens)
        return self._run("batch_prefill", hidden, (1, len(tokens)), cache, self._tensor(positions))

    def decode(self, tokens: Tokens, cache: KVCache) -> Floats:
        """int32[b], one token of each sequence -> logits f32[b, V]."""
        name = "decode" if len(tokens) == 1 else "batch_decode"
        return self._run(name, self.embed(tokens), (len(tokens), 1), cache)

    def verify(self, tokens: Tokens, cache: KVCache) -> Floats:
        """int32[n] of one sequence -> logits f32[n, V] of every position."""
        return self._run("batch_verify", self.embed(tokens), (1, len(tokens)), cache)

    def encode(self, tokens: Tokens, ends: Tokens) -> Floats:
        """int32[n], texts one behind the other, each up to `ends` int32[b] -> vectors f32[b, H].

        Only the library of an embedding model has this function, and no other.
        """
        with self.device.errors("encode"):
            result = self.vm["encode"](self._tensor(tokens), self._tensor(ends), self.params)
            return cast("Floats", self.device.array(result))

    def layer_outputs(self, tokens: Tokens, cache: KVCache) -> list[Floats]:
        """int32[n] of one sequence -> the embedding f32[n, h] and f32[n, h] after each layer.

        Only a library that was made for it has this function; after its last layer it means after
        the last norm.
        """
        hidden = self.embed(tokens)
        shape = self.ffi.Shape((1, *map(int, hidden.shape)))
        embedded = self._reshape(hidden, shape)
        result = self.vm["layer_outputs"](embedded, *cache.arguments, self.params)
        first = self.device.array(hidden).astype(np.float32)
        return [first, *self.device.array(result[0]).copy()]

    def _run(
        self, name: str, hidden: Any, lead: tuple[int, int], cache: KVCache, *extra: Any
    ) -> Floats:
        shape = self.ffi.Shape((*lead, int(hidden.shape[-1])))
        result = self.vm[name](self._reshape(hidden, shape), *extra, *cache.arguments, self.params)
        logits = self.device.array(result[0])
        return cast("Floats", logits.reshape(-1, logits.shape[-1]))

    def _tensor(self, values: Tokens) -> Any:
        return self.device.tensor(np.asarray(values, dtype=np.int32))


class KVCache:
    """TVM's paged KV cache, made by the library's own function, and what sequences keep besides."""

    def __init__(
        self, library: Library, max_batch_size: int, total_tokens: int, prefill_chunk_size: int
    ) -> None:
        """Reserve pages for `total_tokens`; memory is touched only as pages fill.

        It keeps keys and values as the library's parameters were bound for.
        """
        meta = library.metadata
        self.sliding = (meta.sliding_window_size, max(meta.attention_sink_size, 0))
        slides = self.sliding[0] > 0
        sizes = (max_batch_size, total_tokens, prefill_chunk_size, meta.page_size, int(slides))
        name = "create_tir_paged_kv_cache"
        make = library.vm[f"{name}_{meta.kv}" if "kv" in meta.extents else name]
        self._shape = library.ffi.Shape
        with library.device.errors(f"a KV cache of {total_tokens} tokens"):
            self.handle = make(*(self._shape((size,)) for size in sizes))
        self.recurrent = (
            RecurrentState(library.device, meta.states, max_batch_size) if meta.states else None
        )
        self._state = {
            name: tvm_runtime.global_function(f"vm.builtin.kv_state_{name}") for name in STATE
        }
        attention = "vm.builtin.attention_kv_cache_"
        self._slide = tvm_runtime.global_function(attention + "enable_sliding_window_for_seq")
        self._free = tvm_runtime.global_function(attention + "get_num_available_pages")

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the library's functions take of it in the run that `begin` announced."""
        if self.recurrent is None:
            return (self.handle,)
        return self.handle, self.recurrent.tensors, self.recurrent.segments

    def add(self, seq: int) -> None:
        """Begin an empty sequence."""
        if self.recurrent:
            self.recurrent.add(seq)
        self._state["add_sequence"](self.handle, seq)
        if self.sliding[0] > 0:
            self._slide(self.handle, seq, *self.sliding)

    def remove(self, seq: int) -> None:
        """Forget a sequence and free its pages."""
        if self.recurrent:
            self.recurrent.remove(seq)
        self._state["remove_sequence"](self.handle, seq)

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        """Begin `child` with the first `position` tokens of `parent` (-1: all).

        Raises:
            QccError: the model has recurrent layers, and these are not all of the parent's tokens.
        """
        if self.recurrent:
            self.recurrent.fork(parent, child, position)
        self._state["fork_sequence"](self.handle, parent, child, position)

    def pop(self, seq: int, count: int) -> None:
        """Forget the last `count` tokens; never of a sequence that has slid.

        Raises:
            QccError: the model has recurrent layers.
        """
        if self.recurrent:
            self.recurrent.pop(count)
        self._state["popn"](self.handle, seq, count)

    def clear(self) -> None:
        """Forget all sequences."""
        if self.recurrent:
            self.recurrent.clear()
        self._state["clear"](self.handle)

    def begin(self, seqs: Sequence[int], lengths: Sequence[int]) -> None:
        """Announce a run that appends `lengths[i]` tokens to sequence `seqs[i]`."""
        if self.recurrent:
            self.recurrent.begin(seqs, lengths)
        self._state["begin_forward"](self.handle, self._shape(seqs), self._shape(lengths))

    def end(self) -> None:
        """The run that `begin` announced is over."""
        self._state["end_forward"](self.handle)
        if self.recurrent:
            self.recurrent.end()

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return int(self._free(self.handle))


def total_pages(meta: Metadata, max_batch_size: int, total_tokens: int) -> int:
    """Pages that TVM allocates for a cache of this size (paged_kv_cache.cc)."""
    sliding = 2 * max_batch_size if meta.sliding_window_size > 0 else 0
    return math.ceil(total_tokens / meta.page_size) + 1 + sliding


def _load_module(ffi: Any, path: Path) -> Any:
    """The module in the file that is at `path` now, whatever this process loaded from there before.

    dlopen hands out again what it loaded under the same name, so each state of a file gets a name
    of its own: a link, needed only while it loads. A file that is loaded keeps its inode.
    """
    state = path.stat()
    with tempfile.TemporaryDirectory(prefix="qcc-") as folder:
        link = Path(folder) / f"{state.st_ino}-{state.st_mtime_ns}{path.suffix}"
        link.symlink_to(path.resolve())
        try:
            return ffi.load_module(str(link))
        except RuntimeError as err:
            raise OSError(_last_line(err).replace(str(link), str(path))) from err


def _last_line(err: Exception) -> str:
    """The last line of a message: TVM's begin with a traceback of their own."""
    lines = [line for line in str(err).splitlines() if line.strip()]
    return lines[-1] if lines else type(err).__name__
