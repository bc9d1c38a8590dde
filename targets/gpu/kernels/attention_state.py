"""The merge of attention over two sets of keys."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import kernel, tensor
from qcc.targets.gpu.kernels.attention_func import (
    Plan,
    barrier,
    ceil_div,
    flat,
    grid,
    keep,
    shared,
    strided,
    when,
)
from qcc.targets.gpu.kernels.attention_score import emit_carried


def merge_state(plan: Plan) -> Any:
    """v, s <- the attention over both key sets, from (v, s) and (v_other, s_other); s in base 2.

    A carrier's row of v is made anew from the s of its group; its own s is never read. One thread
    of a row reads and writes its s, and hands the weights to the others.
    """
    c, chunks = plan.config, plan.chunks
    heads, limit = c.num_attention_heads, plan.limits.max_threads
    of_token = min(max(limit // chunks, 1), heads)  # heads of a workgroup
    tokens = max(limit // (chunks * of_token), 1)
    together = tokens * of_token
    threads = min(limit, -(-together * chunks // 32) * 32)
    with kernel("merge_state") as build:
        n = T.int32()
        arrays = []
        for suffix in ("", "_other"):
            v = tensor(f"v{suffix}", (n, heads, c.head_dim), c.dtype)
            s = tensor(f"s{suffix}", (n, heads), "float32")
            arrays += [v, s]
        with build.body():
            # A carrier gets single numbers, so that then v is no array of vectors.
            wide = flat if c.returns_lse else plan.vectors
            v, v_other = (wide(each, n * (heads * c.head_dim)) for each in arrays[::2])
            s, s_other = (flat(each, n * heads) for each in arrays[1::2])
            blocks = -(-heads // of_token)
            with grid(threads, ceil_div(n, tokens), blocks) as (first_token, block, thread):
                weights = shared(together), shared(together)

                def place(i: Any) -> tuple[Any, Any]:
                    """A row of the workgroup: which it is, and whether it is merged."""
                    token = first_token * tokens + i // of_token
                    head = block * of_token + i % of_token
                    found = T.bitwise_and(token < n, head < heads)
                    if c.returns_lse:
                        found = T.bitwise_and(found, head % plan.stride < c.group)
                    return T.bind(token * heads + head), found

                with when(thread < together):
                    row, merged = place(thread)
                    with when(merged):
                        a, b = T.bind(s[row]), T.bind(s_other[row])
                        top = keep(T.max(a, b))
                        parts = [keep(T.exp2(each - top)) for each in (a, b)]
                        total = keep(parts[0] + parts[1])
                        for weight, part in zip(weights, parts, strict=True):
                            T.buffer_store(weight, part / total, [thread])
                        lse = keep(top + T.log2(total))
                        T.buffer_store(s, lse, [row])
                        if c.returns_lse:
                            member = T.bind(row % plan.stride)
                            emit_carried(plan, v, row - member, member, lse)
                barrier()

                def one(i: Any) -> None:
                    row, merged = place(i // chunks)
                    with when(merged):
                        at = T.bind(row * chunks + i % chunks)
                        x, y = (T.bind(plan.load(each, at)) for each in (v, v_other))
                        of_x, of_y = (plan.splat(each[i // chunks]) for each in weights)
                        plan.store(v, at, x * of_x + y * of_y)

                strided(together * chunks, thread, threads, one)
    return build.result()
