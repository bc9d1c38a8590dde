"""The merge of attention over two sets of keys."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import kernel, rows_of, tensor
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention import Tile, emit_carried
from qcc.targets.spec import KVCacheConfig

_PARALLEL_TOKENS = 8  # fewer are not worth waking the threads


def merge_state(config: KVCacheConfig, tile: Tile) -> Any:
    """v, s <- the attention over both key sets, from (v, s) and (v_other, s_other); s in base 2.

    A carrier's row of v is made anew from the s of its group; its own s is never read.
    """
    heads, dim, lanes = config.num_attention_heads, config.head_dim, tile.dim_lanes
    with kernel("merge_state") as build:
        n = T.int32()
        v, s = rows_of("v", n), tensor("s", (n, T.int32()), "float32")
        v2, s2 = rows_of("v_other", n), tensor("s_other", (n, T.int32()), "float32")
        with build.body():
            v, v2 = vx.flat(v, n * (heads * dim)), vx.flat(v2, n * (heads * dim))
            s, s2 = vx.flat(s, n * heads), vx.flat(s2, n * heads)

            def merge(at: Any) -> None:
                a, b = T.bind(s[at]), T.bind(s2[at])
                top = vx.keep(T.max(a, b), 1)
                pa, pb = vx.exp2(a - top, 1), vx.exp2(b - top, 1)
                total = T.bind(pa + pb)
                wa, wb = (T.bind(vx.splat(T.bind(p / total), lanes)) for p in (pa, pb))
                vx.store(s, at, top + vx.log2(total, 1), 1)
                for d in range(0, dim, lanes):
                    x = T.bind(vx.load(v, at * dim + d, lanes))
                    y = T.bind(vx.load(v2, at * dim + d, lanes))
                    vx.store(v, at * dim + d, x * wa + y * wb, lanes)

            def token(i: Any) -> None:
                if not config.returns_lse:
                    with T.serial(0, heads) as h:
                        merge(T.bind(i * heads + h))
                    return
                with T.serial(0, config.num_key_value_heads) as k:
                    first = T.bind(i * heads + k * (config.group + 1))
                    with T.serial(0, config.group) as g:
                        merge(T.bind(first + g))
                        emit_carried(config, v, first, g, vx.load(s, first + g, 1))

            vx.for_tokens(n, _PARALLEL_TOKENS, token)
    return build.result()
