"""What a compiled library says of itself: `_metadata()` (CONTRACTS section 4), checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from qcc.runtime.errors import QccError

FORMAT = 1
TILES = "_tiles"  # ends the names of caches for processors with tile registers
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "int32": 4}
DTYPE_BYTES |= {"uint16": 2, "int16": 2, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class TensorType:
    """A tensor without its data."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in C order."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Slot:
    """One entry of the packed parameter tuple: `repack`(stored tensors), or one as it is.

    A setting, by its name, is what the runtime fills and has no stored tensors.
    """

    type: TensorType
    stored: tuple[str, ...]
    repack: str | None
    setting: str | None = None


@dataclass(frozen=True)
class KVStorage:
    """How a KV cache keeps keys and values: as `token_values` numbers of the compute dtype a token
    and layer; `query_heads` is what TVM takes the queries for (targets/spec.py).
    """

    name: str
    query_heads: int
    token_values: int


@dataclass(frozen=True)
class Metadata:
    """The fields that the runtime uses. Sizes in tokens; -1 where the library has none."""

    target: str
    task: str  # chat or embedding
    context_window_size: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    max_batch_size: int
    vocab_size: int
    hidden_size: int
    page_size: int
    compute_dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_table_bytes: int
    memory_usage: dict[str, int]
    params: tuple[TensorType, ...]
    slots: tuple[Slot, ...]
    states: tuple[TensorType, ...] = ()  # of one sequence, besides keys and values
    # How the KV cache can keep keys and values, the default first, and which it does.
    kv_storages: tuple[KVStorage, ...] = ()
    kv: str = ""
    extents: tuple[str, ...] = ()  # of tensors behind the slots in the packed tuple
    precision: str = "both"  # or high: the kernels compute in float32 only

    @classmethod
    def parse(cls, text: str, where: str) -> Metadata:
        """Parse the JSON text of `_metadata()`; `where` is the library, for errors.

        Raises:
            QccError: not made by this version of qcc, or inconsistent.
        """
        try:
            data = json.loads(text)
            found = data.get("qcc", {}).get("format")
            if found != FORMAT:
                raise QccError(
                    f"{where}: library format {found!r}, this qcc runs format {FORMAT}; "
                    "compile the model again with qcc compile"
                )
            task = str(data["model_task"])
            return cls(task=task, **_sizes(data), **_kv(data), **_tensors(data))
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise QccError(
                f"{where}: unusable _metadata ({type(err).__name__}: {err}); "
                "compile the model again with qcc compile"
            ) from err

    @property
    def max_length(self) -> int | None:
        """The most tokens of one sequence; None with a sliding window: no limit."""
        return None if self.sliding_window_size > 0 else self.context_window_size

    @property
    def kv_names(self) -> list[str]:
        """The storages that a user may choose from, the library's default first."""
        return [s.name for s in self.kv_storages if not s.name.endswith(TILES)]

    def with_kv(self, kv: str, tiles: bool = False) -> Metadata:
        """The same for a cache of storage `kv`, with kernels that use tile registers if they may.

        Raises:
            QccError: the library has no such cache.
        """
        if kv not in self.kv_names:
            raise QccError(f"--kv {kv}: the library's cache keeps {', '.join(self.kv_names)}")
        fast = kv + TILES
        found = tiles and any(storage.name == fast for storage in self.kv_storages)
        return replace(self, kv=fast if found else kv)

    @property
    def kv_storage(self) -> KVStorage:
        """The chosen one; of no numbers in a library without a cache."""
        chosen = (storage for storage in self.kv_storages if storage.name == self.kv)
        return next(chosen, KVStorage("", 0, 0))

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        values = self.num_hidden_layers * self.kv_storage.token_values
        return values * DTYPE_BYTES[self.compute_dtype]

    @property
    def kv_workspace_bytes(self) -> int:
        """Bytes that the KV cache holds for one chunk: q, k, v, output, two log-sum-exps (f32)."""
        values = 2 * self.num_attention_heads * self.head_dim + self.kv_storage.token_values
        per_token = values * DTYPE_BYTES[self.compute_dtype]
        return self.prefill_chunk_size * (per_token + 2 * self.num_attention_heads * 4)

    @property
    def state_bytes(self) -> int:
        """Bytes of what a sequence keeps besides keys and values, however long it is."""
        return sum(state.nbytes for state in self.states)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.type.nbytes for slot in self.slots)


def _sizes(data: dict[str, Any]) -> dict[str, Any]:
    names = ("context_window_size", "sliding_window_size", "attention_sink_size")
    sizes = {name: int(data[name]) for name in (*names, "prefill_chunk_size", "max_batch_size")}
    if sizes["context_window_size"] < 1 and sizes["sliding_window_size"] < 1:
        raise ValueError("neither context_window_size nor sliding_window_size is positive")
    if min(sizes["prefill_chunk_size"], sizes["max_batch_size"]) < 1:
        raise ValueError("prefill_chunk_size or max_batch_size is not positive")
    usage = {str(name): int(size) for name, size in data["memory_usage"].items()}
    own = data["qcc"]
    widths = {"vocab_size": int(own["vocab_size"]), "hidden_size": int(own.get("hidden_size", 0))}
    return {**sizes, **widths, "memory_usage": usage}


def _kv(data: dict[str, Any]) -> dict[str, Any]:
    kv, own = data["kv_cache"], data["qcc"]
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    if own["compute_dtype"] not in DTYPE_BYTES:
        raise ValueError(f"compute_dtype {own['compute_dtype']!r}")
    storages = tuple(
        KVStorage(str(name), int(sizes["query_heads"]), int(sizes["token_values"]))
        for name, sizes in own["kv_storages"].items()
    )
    return {
        **{name: int(kv[name]) for name in names},
        "target": str(own["target"]),
        "page_size": int(own["page_size"]),
        "compute_dtype": own["compute_dtype"],
        "precision": str(own.get("precision", "both")),
        "kv_storages": storages,
        "kv": storages[0].name if storages else "",
        "extents": tuple(map(str, own["extents"])),
        "rope_table_bytes": int(own.get("rope_table_bytes", 0)),
    }


def _tensors(data: dict[str, Any]) -> dict[str, Any]:
    params = tuple(_type(item) for item in data["params"])
    known = {param.name for param in params}
    slots = []
    for item in data["qcc"]["slots"]:
        setting = item.get("setting")
        slot = Slot(_type(item), tuple(map(str, item["from"])), item["repack"], setting)
        unknown = [name for name in slot.stored if name not in known]
        if unknown:
            raise ValueError(f"slot {slot.type.name!r} is made from unknown {unknown}")
        if setting is None and slot.repack is None and len(slot.stored) != 1:
            raise ValueError(
                f"slot {slot.type.name!r} takes {len(slot.stored)} tensors as they are"
            )
        slots.append(slot)
    states = tuple(_type({**item, "dtype": "float32"}) for item in data["qcc"].get("states", []))
    return {"params": params, "slots": tuple(slots), "states": states}


def _type(item: dict[str, Any]) -> TensorType:
    if item["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{item['name']!r} has dtype {item['dtype']!r}")
    return TensorType(str(item["name"]), tuple(map(int, item["shape"])), item["dtype"])
