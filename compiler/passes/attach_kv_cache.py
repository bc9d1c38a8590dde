"""Give a module the function that makes its KV cache; the kernels come from the target.

Before: IRModule with any functions.
After: the same and
    @R.function
    def create_tir_paged_kv_cache(max_batch_size: R.Shape([b]), ..., support_sliding_window: ...):
        table = R.call_tir(rope_table, (inv_freq,), ...)                 # unless the kernels rotate
        return R.call_packed("vm.builtin.paged_attention_kv_cache_create", ..., table, kernels...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from qcc.targets.spec import PAGE_SIZE, KVCacheConfig, KVKernels, KVStorage

FUNCTION = "create_tir_paged_kv_cache"  # one that has no choice of storage; others add its name
PARAMETERS = (
    "max_batch_size",
    "max_total_seq_len",
    "prefill_chunk_size",
    "page_size",
    "support_sliding_window",
)
_MHA = 0  # kind of every layer
_ROPE_NONE, _ROPE_NORMAL, _ROPE_INLINE = 0, 1, 2


def function_name(storage: str) -> str:
    """Of the function that makes a cache of a storage; "": of the compute dtype, as it is."""
    return f"{FUNCTION}_{storage}" if storage else FUNCTION


@tvm.transform.module_pass(opt_level=0, name="AttachKVCache")
class AttachKVCache:
    """Add `create_tir_paged_kv_cache`, each argument a 1-element shape.

    The VM refuses a page_size that is not PAGE_SIZE: the kernels are made for it.

    With config.sliding_window_size > 0 every cache supports sliding windows, whatever the last
    argument says; without, a cache asked to support them is refused by the runtime.
    """

    def __init__(
        self, config: KVCacheConfig, kernels: KVKernels, storages: Sequence[KVStorage] = ()
    ) -> None:
        self.config, self.kernels, self.storages = config, kernels, storages

    def transform_module(self, mod: tvm.IRModule, ctx: Any) -> tvm.IRModule:
        bb = relax.BlockBuilder(mod)
        c = self.config
        plain = KVStorage("", c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        for storage in (plain, *self.storages):
            self._function(bb, storage)
        return bb.get()

    def _function(self, bb: Any, storage: KVStorage) -> None:
        sizes: list[Any] = [tirx.Var(name, "int64") for name in PARAMETERS]
        sizes[PARAMETERS.index("page_size")] = tirx.IntImm("int64", PAGE_SIZE)
        params = [
            relax.Var(name, relax.ShapeType([size]))
            for name, size in zip(PARAMETERS, sizes, strict=True)
        ]
        with bb.function(function_name(storage.name), params):
            cache = bb.emit(
                relax.call_pure_packed(
                    "vm.builtin.paged_attention_kv_cache_create",
                    *self._arguments(bb, sizes, storage),
                    ty_args=relax.AnyType(),
                )
            )
            bb.emit_func_output(cache)

    def _arguments(self, bb: Any, sizes: list[Any], storage: KVStorage) -> list[Any]:
        """The arguments of PagedAttentionKVCache's constructor, in its order."""
        c, k = self.config, self.kernels
        sliding = c.sliding_window_size > 0
        if sliding:
            sizes = [*sizes[:-1], tirx.IntImm("int64", 1)]
        mode = _ROPE_INLINE if sliding else _ROPE_NORMAL if k.rope_table else _ROPE_NONE

        def func(name: str) -> Any:
            return bb.add_func(getattr(k, name), f"kv_cache_{name}")

        def attention(name: str) -> Any:
            if getattr(k, name) is None:
                return relax.Tuple([])
            return relax.Tuple([tvm.ir.StringImm("tirx"), func(name)])

        return [
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, c.num_hidden_layers]),  # layers of the only pipeline stage
            relax.prim_value(storage.num_attention_heads),
            relax.prim_value(storage.num_key_value_heads),
            relax.prim_value(storage.head_dim),  # of q and k
            relax.prim_value(storage.head_dim),  # of v
            relax.ShapeExpr([_MHA] * c.num_hidden_layers),
            relax.prim_value(False),  # no transfer to other machines
            relax.prim_value(mode),
            # Rope scale and theta: our kernels have their own frequencies.
            relax.prim_value(storage.rope_scale),
            relax.prim_value(10000.0),
            self._rope_table(bb) if k.rope_table else relax.prim_value(0),
            bb.emit(relax.op.zeros((), c.dtype)),  # tells dtype and device
            func("transpose_append"),
            relax.prim_value(0),  # no multi-head latent attention
            attention("prefill_ragged"),
            attention("prefill"),
            attention("decode"),
            attention("prefill_sliding"),
            attention("decode_sliding"),
            attention("tree_prefill_paged"),
            attention("tree_prefill"),
            relax.Tuple([]),  # nor its prefill
            relax.Tuple([func("merge_state")]),
            func("split_rotary"),
            func("copy_single_page"),
            func("debug_get_kv"),
            func("compact_copy"),
        ]

    def _rope_table(self, bb: Any) -> Any:
        """[max_positions, rotary_dim], filled once a cache."""
        c = self.config
        inv_freq = relax.const(np.array(c.inv_freq, "float32"), "float32")
        table = relax.TensorType((c.max_positions, c.rotary_dim), "float32")
        rope_table = bb.add_func(self.kernels.rope_table, "kv_cache_rope_table")
        return bb.emit(relax.call_tir(rope_table, (inv_freq,), out_ty=table))
