"""The CPU's kernels for TVM's paged KV cache, and the ways in which it can keep keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcc.runtime.errors import QccError
from qcc.targets.attention import Mask
from qcc.targets.cpu.isa import isa_of
from qcc.targets.cpu.kernels import attention_pages as pages
from qcc.targets.cpu.kernels import attention_tiles as tiles
from qcc.targets.cpu.kernels import rope
from qcc.targets.cpu.kernels.attention import Tile
from qcc.targets.cpu.kernels.attention_decode import decode_kernel
from qcc.targets.cpu.kernels.attention_prefill import prefill_kernel
from qcc.targets.cpu.kernels.attention_state import merge_state
from qcc.targets.cpu.kernels.attention_storage import storages
from qcc.targets.cpu.kernels.vectors import Registers
from qcc.targets.spec import TILES, KVCacheConfig, KVKernels, KVStorage

HEAD_DIM_STEP = 4  # the narrowest vector
MAX_SLIDING = 1 << 16


def kv_storages(config: KVCacheConfig, target: Any) -> tuple[KVStorage, ...]:
    """f32, f16 and int8, as TVM is told of them; and those that use tiles, where there are any."""
    _check(config)
    found = [storage.declared(config) for storage in storages(config)]
    if _has_tiles(config, target):
        found += [
            replace(storage, name=storage.name + TILES, rope_scale=tiles.ON)
            for storage in found[1:]
        ]
    return tuple(found)


def _has_tiles(config: KVCacheConfig, target: Any) -> bool:
    return isa_of(target).tiles and tiles.fits(config.head_dim)


def kv_kernels(config: KVCacheConfig, target: Any) -> KVKernels:
    """Build the PrimFuncs of a cache for an llvm target; pages hold 16 tokens.

    They know its storage by the shapes that they are called with.
    """
    _check(config)
    amx = _has_tiles(config, target)
    tile = Tile(Registers.of(target), config.head_dim, tiles.KEYS if amx else Tile.keys)
    sliding = config.sliding_window_size > 0
    rotated = config.rotary_dim > 0 and not sliding
    mask: Mask = "sliding" if sliding else "plain"
    ragged = prefill_kernel(config, tile, paged=False, mask=mask, amx=amx)
    paged = prefill_kernel(config, tile, paged=True, mask=mask, amx=amx)
    decode = decode_kernel(config, tile, sliding)
    copy_page = pages.copy_single_page(config)
    trees = config.trees and not sliding  # the runtime has none in a sliding window
    return KVKernels(
        transpose_append=pages.transpose_append(config),
        prefill_ragged=ragged,
        prefill=paged,
        decode=decode,
        # A cache has one kind of layer, and moves only nodes of trees: slots that are never called
        # repeat a kernel, which costs nothing.
        prefill_sliding=paged,
        decode_sliding=decode,
        tree_prefill_paged=prefill_kernel(config, tile, True, "tree") if trees else None,
        tree_prefill=prefill_kernel(config, tile, False, "tree") if trees else None,
        merge_state=merge_state(config, tile),
        split_rotary=rope.split_rotary(config, tile.lanes, with_table=rotated),
        copy_single_page=copy_page,
        debug_get_kv=pages.debug_get_kv(config),
        compact_copy=pages.compact_copy(config) if trees else copy_page,
        rope_table=rope.rope_table(config, tile.lanes) if rotated else None,
    )


def _check(config: KVCacheConfig) -> None:
    """Refuse what the kernels cannot do; the rest the compiler has checked before.

    Raises:
        QccError: an odd head_dim, or a window of more positions than the kernels count.
    """
    if config.head_dim % HEAD_DIM_STEP:
        raise QccError(
            f"head_dim {config.head_dim}: the cpu target needs a multiple of {HEAD_DIM_STEP}"
        )
    # Positions in the cache must fit the exact products of `rope.Rotation`.
    positions = config.sliding_window_size + config.prefill_chunk_size
    if config.sliding_window_size > 0 and positions > MAX_SLIDING:
        raise QccError(
            f"sliding window {config.sliding_window_size} + prefill chunk "
            f"{config.prefill_chunk_size}: the cpu target slides over at most {MAX_SLIDING} "
            "positions; lower --sliding-window or --prefill-chunk"
        )
    assert config.dtype == "float32", config
    assert config.num_attention_heads % config.num_key_value_heads == 0, config
    assert 2 * len(config.inv_freq) == config.rotary_dim <= config.head_dim, config
    if config.sliding_window_size > 0:
        assert 0 <= config.attention_sink_size < config.sliding_window_size, config
        assert not config.layer_window, "a layer's window needs the keys that a sliding one drops"
    assert not config.returns_lse or 0 < config.group <= config.head_dim, config
    assert config.layer_window >= 0 and config.logit_soft_cap >= 0, config
