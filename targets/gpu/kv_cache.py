"""The GPU kernels for TVM's paged KV cache; keys and values are kept in the compute dtype."""

from __future__ import annotations

from qcc.runtime.errors import QccError
from qcc.targets.attention import Mask
from qcc.targets.gpu.kernels import attention_pages as pages
from qcc.targets.gpu.kernels import attention_rope as rope
from qcc.targets.gpu.kernels.attention_decode import decode_kernel
from qcc.targets.gpu.kernels.attention_func import Plan
from qcc.targets.gpu.kernels.attention_prefill import prefill_kernel
from qcc.targets.gpu.kernels.attention_state import merge_state
from qcc.targets.gpu.limits import Limits
from qcc.targets.spec import KVCacheConfig, KVKernels

HEAD_DIM_STEP, MAX_HEAD_DIM = 4, 256
MAX_SLIDING = 1 << 16


def kv_kernels(config: KVCacheConfig, limits: Limits) -> KVKernels:
    """Build the PrimFuncs of a cache for a GPU of these limits; pages hold 16 tokens.

    Raises:
        QccError: heads, a window or a chunk of sizes that the kernels do not do.
    """
    _check(config, limits)
    plan = Plan(config, limits)
    sliding = config.sliding_window_size > 0
    rotated = config.rotary_dim > 0 and not sliding
    mask: Mask = "sliding" if sliding else "plain"
    ragged, paged = (prefill_kernel(plan, where, mask) for where in (False, True))
    decode = decode_kernel(plan, sliding)
    copy_page = pages.copy_single_page(plan)
    trees = config.trees and not sliding  # the runtime has none in a sliding window
    return KVKernels(
        transpose_append=pages.transpose_append(plan),
        prefill_ragged=ragged,
        prefill=paged,
        decode=decode,
        # A cache has one kind of layer, and moves only nodes of trees: slots that are never called
        # repeat a kernel, which costs nothing.
        prefill_sliding=paged,
        decode_sliding=decode,
        tree_prefill_paged=prefill_kernel(plan, True, "tree") if trees else None,
        tree_prefill=prefill_kernel(plan, False, "tree") if trees else None,
        merge_state=merge_state(plan),
        split_rotary=rope.split_rotary(plan, with_table=rotated),
        copy_single_page=copy_page,
        debug_get_kv=pages.debug_get_kv(plan),
        compact_copy=pages.compact_copy(plan) if trees else copy_page,
        rope_table=rope.rope_table(plan) if rotated else None,
    )


def _check(config: KVCacheConfig, limits: Limits) -> None:
    """Refuse what the kernels cannot do; the rest the compiler has checked before.

    Raises:
        QccError: an odd or a large head_dim, a window of more positions than the kernels count, a
            chunk of more tokens than a grid has workgroups.
    """
    if config.head_dim % HEAD_DIM_STEP or config.head_dim > MAX_HEAD_DIM:
        raise QccError(
            f"head_dim {config.head_dim}: GPU targets need a multiple of {HEAD_DIM_STEP} up to "
            f"{MAX_HEAD_DIM}"
        )
    # Positions in the cache must fit the exact products of `rope.Rotation`.
    positions = config.sliding_window_size + config.prefill_chunk_size
    if config.sliding_window_size > 0 and positions > MAX_SLIDING:
        raise QccError(
            f"sliding window {config.sliding_window_size} + prefill chunk "
            f"{config.prefill_chunk_size}: GPU targets slide over at most {MAX_SLIDING} "
            "positions; lower --sliding-window or --prefill-chunk"
        )
    # split_rotary and transpose_append have a row of workgroups for each token.
    if config.prefill_chunk_size > limits.max_grid:
        raise QccError(
            f"prefill chunk {config.prefill_chunk_size}: at most {limits.max_grid} on a GPU; "
            "lower --prefill-chunk"
        )
    assert config.dtype in ("float16", "float32"), config
    assert config.num_attention_heads % config.num_key_value_heads == 0, config
    assert 2 * len(config.inv_freq) == config.rotary_dim <= config.head_dim, config
    if config.sliding_window_size > 0:
        assert 0 <= config.attention_sink_size < config.sliding_window_size, config
        assert not config.layer_window, "a layer's window needs the keys that a sliding one drops"
    assert not config.returns_lse or 0 < config.group <= config.head_dim, config
    assert config.layer_window >= 0 and config.logit_soft_cap >= 0, config
