"""TargetSpec: all that the compiler asks of a device. A target's module defines one: TARGET."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcc.quant_schemes.format import FLOAT_DTYPES
from qcc.runtime.errors import QccError

Tell = Callable[[str], None]  # shows a text while something takes long
TILES = "_tiles"
PAGE_SIZE = 16  # tokens a page of the KV cache, on every target: stock clients ask for this one


@dataclass(frozen=True)
class KVCacheConfig:
    """What a paged KV cache and its attention kernels are made for.

    `inv_freq` holds rotary_dim / 2 angular frequencies (radians a position) after the scaling of
    the rope type; cos and sin are multiplied by `rope_attention_factor`. Dimensions from
    `rotary_dim` on pass through unrotated. Pairs are (i, i + rotary_dim / 2). `max_positions`
    bounds every position. A `sliding_window_size` of -1 means full attention; with one, the cache
    forgets what leaves the window, in every layer.

    `layer_window` is for models some of whose layers see less: the cache keeps every key, and a
    layer that calls attention with a NEGATIVE sm_scale scales its scores by |sm_scale| and sees, at
    position p, the keys at positions > p - layer_window (layer_window of them, p's own included).
    0: no such layers. It does not go with a sliding_window_size.

    A score s becomes logit_soft_cap * tanh(s / logit_soft_cap), after the scale and before the
    softmax; 0: it stays.

    With `returns_lse` attention also returns ln(sum of exp(score)) over the keys that a query sees,
    of the scores that the softmax gets: a layer whose softmax has one more term exp(sink) in its
    sum multiplies its output by sigmoid(lse - sink). The query heads of kv head k are then
    k * (group + 1) .. k * (group + 1) + group - 1, and k * (group + 1) + group is their carrier, a
    head among the num_attention_heads = kv heads * (group + 1). What a carrier's query holds does
    not matter; its output [head_dim] is lse of the group's heads in their order, then zeros. So
    group must not exceed head_dim.

    With `trees` a chunk may be a token tree, unless a window slides. Without, a target may leave
    out the kernels for them, which take a tenth of a build; TVM's cache then refuses trees.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    inv_freq: tuple[float, ...]
    rope_attention_factor: float
    max_positions: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    dtype: str
    layer_window: int = 0
    logit_soft_cap: float = 0.0
    returns_lse: bool = False
    trees: bool = False

    @property
    def group(self) -> int:
        """Query heads of a kv head, without a carrier."""
        return self.num_attention_heads // self.num_key_value_heads - self.returns_lse


@dataclass(frozen=True)
class KVStorage:
    """How a cache keeps keys and values (f32, f16 or int8), in the numbers that TVM is told.

    For TVM everything is of the compute dtype. The product of num_key_value_heads and head_dim is
    what a token's keys take of it, as the kernels pack them, and (num_attention_heads + 2 *
    num_key_value_heads) * head_dim is what q, k and v together have. `rope_scale` goes to the
    attention kernels, which may take it for a sign. A name that ends in TILES is for processors
    with tile registers that the process may use.
    """

    name: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_scale: float = 1.0


@dataclass(frozen=True)
class KVKernels:
    """The PrimFuncs that TVM's paged KV cache calls, in the arguments' order of its constructor.

    `rope_table` is a PrimFunc (inv_freq f32[r/2], table f32[max_positions, r]) -> fills the cosines
    and sines; the cache hands its result to `split_rotary`. None: `split_rotary` only splits and
    the attention kernels rotate (the cache's inline rope, which a sliding window needs). None for
    `tree_prefill_paged` and `tree_prefill`: the cache refuses token trees.
    """

    transpose_append: Any
    prefill_ragged: Any
    prefill: Any
    decode: Any
    prefill_sliding: Any
    decode_sliding: Any
    tree_prefill_paged: Any | None
    tree_prefill: Any | None
    merge_state: Any
    split_rotary: Any
    copy_single_page: Any
    debug_get_kv: Any
    compact_copy: Any
    rope_table: Any | None


@dataclass(frozen=True)
class BuildOptions:
    """What `qcc compile` says of the device: processor, triple, optimization level."""

    mcpu: str = "native"  # `--mcpu` may list several: see `each`
    triple: str | None = None
    opt: int = 2
    precision: str = "both"  # or "high": a library that computes in float32 only, built faster

    def each(self) -> list[BuildOptions]:
        """The options for one processor of a list a,b,c each.

        Raises:
            QccError: the list names none.
        """
        names = [name.strip() for name in self.mcpu.split(",") if name.strip()]
        if not names:
            raise QccError("--mcpu: no processor named; native, x86-64-v3, ...")
        return [replace(self, mcpu=name) for name in names]


@dataclass(frozen=True)
class PackageOptions:
    """What `qcc package` says: the artifact, the folder to write, the name of the model in it.

    `force`: replace a folder that another program wrote. `tell` is told what takes long.
    """

    artifact: Path
    out: Path
    name: str | None = None
    force: bool = False
    tell: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class TargetSpec:
    """A device as the compiler sees it; capabilities are fields, nobody asks for the name.

    `resolve(options)` returns the tvm.target.Target and the library's suffix (`<target>[-<arch>]`);
    `passes(phase, target, opt)` the target's own passes of a phase of the pipeline;
    `requires(target)` what a machine must have to run its code, as runtime.machine reads it;
    `rank(target)` the name of its instruction set and a number: of the libraries that a machine
    can run, the runtime prefers the highest;
    `kv_kernels(config, target)` the attention kernels; `kv_storages(config, target)` how a cache
    can keep its numbers, that of the compute dtype first (none: there is no choice);
    `export(executable, path, options, tell)` writes the library, tells what takes long, and returns
    what its code needs besides, as entries for `requires`; `check(module)` refuses scheduled
    kernels that no device runs; `needless_passes` names steps of TVM's lowering that cost time and
    change nothing; `packages` makes what others load of an artifact:
    kind, as web -> function, which returns what it made as plain data (`path`, `bytes`, ...);
    `dtypes` are the floating dtypes that its kernels read and compute in;
    `lacks()` says what must be installed or built before a library is made in a moment, or "".
    """

    name: str
    description: str
    compute_dtype: str | None  # what the graph computes in; None: the scheme's dtype
    default_prefill_chunk: int
    library_extension: str
    resolve: Callable[[BuildOptions], tuple[Any, str]]
    passes: Callable[[str, Any, int], Sequence[Any]]
    requires: Callable[[Any], Mapping[str, Any]]
    kv_kernels: Callable[[KVCacheConfig, Any], KVKernels]
    export: Callable[[Any, Path, BuildOptions, Tell], Mapping[str, Any]]
    rank: Callable[[Any], tuple[str, int]] = lambda _: ("", 0)
    needless_passes: tuple[str, ...] = ()
    kv_storages: Callable[[KVCacheConfig, Any], tuple[KVStorage, ...]] = lambda *_: ()
    check: Callable[[Any], None] = lambda _: None
    packages: Mapping[str, Callable[[PackageOptions], Mapping[str, Any]]] = field(
        default_factory=dict
    )
    lacks: Callable[[], str] = lambda: ""
    dtypes: tuple[str, ...] = tuple(FLOAT_DTYPES)
