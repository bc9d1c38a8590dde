"""The merge of attention over two sets of keys."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.gpu.kernels.attention_func import (
    Plan,
    barrier,
    ceil_div,
    flat,
    grid,
    keep,
    kernel,
    shared,
    tensor,
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
    together = max(limit // chunks, 1)  # rows of a workgroup
    threads = min(limit, ceil_div(together * chunks, 32) * 32)
    with kernel("merge_state") as build:
        n = T.int32()
        arrays = []
        for suffix in ("", "_other"):
            v = tensor(f"v{suffix}", (n, heads, c.head_dim), c.dtype)
            s = tensor(f"s{suffix}", (n, heads), "float32")
            arrays += [v, s]
        with build.body():
            rows = n * heads
            # A carrier gets single numbers, so that then v is no array of vectors.
            wide = flat if c.returns_lse else plan.vectors
            v, v_other = (wide(each, rows * c.head_dim) for each in arrays[::2])
            s, s_other = (flat(each, rows) for each in arrays[1::2])
            with grid(threads, ceil_div(rows, together)) as (block, _, thread):
                first, second = shared(together), shared(together)
                with when(thread < together):
                    row = T.bind(block * together + thread)
                    with when(_merged(plan, row, rows)):
                        a, b = T.bind(s[row]), T.bind(s_other[row])
                        top = keep(T.max(a, b))
                        of_a, of_b = keep(T.exp2(a - top)), keep(T.exp2(b - top))
                        total = keep(of_a + of_b)
                        T.buffer_store(first, of_a / total, [thread])
                        T.buffer_store(second, of_b / total, [thread])
                        lse = keep(top + T.log2(total))
                        T.buffer_store(s, lse, [row])
                        if c.returns_lse:
                            member = T.bind(row % plan.stride)
                            emit_carried(plan, v, row - member, member, lse)
                barrier()
                with T.serial(0, ceil_div(together * chunks, threads)) as step:
                    i = T.bind(step * threads + thread)
                    row = T.bind(block * together + i // chunks)
                    inside = T.bitwise_and(i < together * chunks, _merged(plan, row, rows))
                    with when(inside):
                        at = T.bind(row * chunks + i % chunks)
                        x, y = (T.bind(plan.load(each, at)) for each in (v, v_other))
                        of_x, of_y = (plan.splat(each[i // chunks]) for each in (first, second))
                        plan.store(v, at, x * of_x + y * of_y)
    return build.result()


def _merged(plan: Plan, row: Any, rows: Any) -> Any:
    """Whether there is such a row and it is no carrier."""
    if not plan.config.returns_lse:
        return row < rows
    return T.bitwise_and(row < rows, row % plan.stride < plan.config.group)
