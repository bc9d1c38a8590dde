"""Attention of one new token a sequence against cached pages.

A workgroup has a part of a sequence's pages and a kv head with its query heads, 8 at most: so keys
and values are read once. While the scores are formed a thread holds a key, while the values are
summed a vector of a head's numbers. A long context is cut into parts where there are too few
sequences and heads to fill a GPU; a second kernel merges them.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx import truncdiv, truncmod
from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, kernel, tensor
from qcc.targets.gpu.kernels.attention_func import (
    Plan,
    Reg,
    barrier,
    ceil_div,
    f32,
    flat,
    grid,
    keep,
    keep_int,
    shared,
    strided,
    when,
)
from qcc.targets.gpu.kernels.attention_keys import PagedKeys, Sequences
from qcc.targets.gpu.kernels.attention_rope import Rotation
from qcc.targets.gpu.kernels.attention_score import (
    MASKED,
    NO_KEY,
    ScoreRule,
    emit_carried,
    log_sum,
    weight,
)
from qcc.targets.spec import PAGE_SIZE

HEADS = 8  # of a workgroup at most: each takes a vector of registers
MAX_PARTS = 32  # of a sequence
WORKGROUPS = 256  # enough for any GPU: no part is cut for more
_WAYS = 16  # threads that reduce a head's numbers


def decode_kernel(plan: Plan, sliding: bool) -> Any:
    """The PrimFunc of the cache's decode slot: q [b, hq, d] -> output [b, hq, d], lse [b, hq]."""
    return _Decode(plan, sliding).build()


class _Decode:
    def __init__(self, plan: Plan, sliding: bool) -> None:
        c = plan.config
        self.plan, self.config, self.sliding = plan, c, sliding
        self.blocks = ceil_div(c.group, HEADS)  # workgroups of a kv head
        self.heads = ceil_div(c.group, self.blocks)  # of a workgroup
        # Two at least: TVM takes what only thread 0 touches for a race.
        self.states_held = max(self.heads, 2)
        self.threads = min(plan.limits.max_threads, 128 if plan.chunks <= 128 else 256)
        assert plan.chunks <= self.threads, c
        self.rotation: Any = Rotation(plan) if sliding else None

    def build(self) -> Any:
        c, plan = self.config, self.plan
        with kernel("paged_decode_sliding" if self.sliding else "paged_decode") as build:
            batch = self.batch = T.int32()
            q = tensor("q", (batch, c.num_attention_heads, c.head_dim), c.dtype)
            self.sequences = Sequences(plan)
            self.keys = PagedKeys(plan, self.sequences, batch, self.sliding)
            self.keys.declare()
            q_position = aux_buffer("q_rope_position", (batch,))
            if self.sliding or c.layer_window:
                self.sequences.add("q_position", q_position)
            out = tensor("output", (batch, c.num_attention_heads, c.head_dim), c.dtype)
            lse = tensor("lse", (batch, c.num_attention_heads), "float32")
            T.arg("rotary_mode", T.int32())
            T.arg("rope_scale", T.float32())
            T.arg("rope_theta", T.float32())
            self.rule = ScoreRule(c, T.arg("sm_scale", T.float32()))
            with build.body():
                size = batch * (c.num_attention_heads * c.head_dim)
                self.q = plan.vectors(q, size)
                # A carrier gets single numbers, so that then the output is no array of vectors.
                self.out = (flat if c.returns_lse else plan.vectors)(out, size)
                self.lse = flat(lse, batch * c.num_attention_heads)
                self.keys.enter()
                self.sequences.gather(batch, self.keys.arrays + 3)
                self._launch(self._parts())
        return build.result()

    def _parts(self) -> Any:
        """Into how many parts a sequence is cut: of a step at least, for one of mean length."""
        mean = self.keys.listed // T.max(self.batch, 1)
        rest = WORKGROUPS // T.max(self.batch * (self.config.num_key_value_heads * self.blocks), 1)
        wanted = T.min(mean // (self.threads // PAGE_SIZE), rest)
        return T.bind(T.max(T.min(wanted, MAX_PARTS), 1))

    def _launch(self, parts: Any) -> None:
        c = self.config
        rows = self.batch * (c.num_key_value_heads * c.group)
        with T.If(parts == 1):
            with T.Then():
                self.parts: Any = 1
                self._kernel()
            with T.Else():
                self.parts = parts
                size = rows * parts
                self.sums = T.alloc_buffer((size * c.head_dim,), "float32")
                self.states = T.alloc_buffer((size * 2,), "float32")
                self._kernel()
                self._merge(rows)

    def _kernel(self) -> None:
        c = self.config
        y = c.num_key_value_heads * self.blocks
        with grid(self.threads, self.batch * self.parts, y) as (task, of_head, thread):
            self.thread = thread
            self.b = T.bind(truncdiv(task, self.parts))
            self.part = T.bind(truncmod(task, self.parts))
            self.head, block = T.bind(of_head // self.blocks), T.bind(of_head % self.blocks)
            self.first = T.bind(block * self.heads)  # of the group's heads
            self._allocate()
            self.scale = self.rule.factor()
            self.kv_len = self.keys.select(self.b)
            based = self.sliding or c.layer_window > 0
            self.k_base = keep_int(self.sequences("k_position", self.b)) if based else 0
            if self.rotation:
                self.rotation.prepare(thread)
            with when(thread < self.states_held):
                T.buffer_store(self.top, f32(NO_KEY), [thread])
            self._phases()
            self._finish()

    def _allocate(self) -> None:
        plan, heads, threads = self.plan, self.heads, self.threads
        vector = plan.typed("float32")
        self.queries = shared(heads * plan.chunks, vector)
        self.weights = shared(heads * threads)
        self.ways = shared(self.states_held * _WAYS)
        self.top, self.decay = shared(self.states_held), shared(self.states_held)
        self.crossing = shared(threads, vector)
        self.acc = T.alloc_buffer((heads,), vector, scope="local")
        self.mass = T.alloc_buffer((heads,), "float32", scope="local")
        for g in range(heads):
            T.buffer_store(self.acc, plan.splat(0.0), [g])
            T.buffer_store(self.mass, f32(0.0), [g])

    def _phases(self) -> None:
        """Go over the part's keys: once, or first the attention sinks and then the window."""
        c = self.config
        if not self.sliding:
            begin: Any = 0
            if c.layer_window:
                oldest = self.rule.oldest(self.sequences("q_position", self.b) - self.k_base)
                begin = keep_int(T.min(T.max(oldest, 0), self.kv_len))
            self._load_queries(None)
            self._cut(begin, self.kv_len, 0)
            return
        window, sinks = c.sliding_window_size, c.attention_sink_size
        position = keep_int(self.sequences("q_position", self.b))
        sink_end = keep_int(T.min(T.max(sinks - self.k_base, 0), self.kv_len))
        oldest = position - (window - sinks) + 1 - self.k_base
        with T.serial(0 if sinks else 1, 2) as phase:
            in_window = phase == 1
            begin = keep_int(T.Select(in_window, T.max(sink_end, oldest), 0))
            stop = keep_int(T.Select(in_window, self.kv_len, sink_end))
            at = keep_int(T.Select(in_window, position, T.min(position, window - 1)))
            self._load_queries(at)
            self._cut(begin, stop, keep_int(T.Select(in_window, self.keys.skip, 0)))

    def _load_queries(self, position: Any) -> None:
        """The queries times the scale of the scores; a head beyond the last repeats it."""
        plan, c = self.plan, self.config
        row = T.bind(self.b * c.num_attention_heads + self.head * plan.stride)
        steps = self.rotation.steps if self.rotation else plan.chunks
        factor = self.scale * f32(self.rotation.scale if self.rotation else 1.0)

        def one(i: Any) -> None:
            g = T.bind(i // steps)
            base = keep_int((row + T.min(self.first + g, c.group - 1)) * plan.chunks)

            def load(chunk: Any) -> Any:
                return plan.load(self.q, base + chunk)

            def put(chunk: Any, value: Any) -> None:
                T.buffer_store(self.queries, value * plan.splat(factor), [g * plan.chunks + chunk])

            if self.rotation:
                self.rotation.step(T.bind(i % steps), position, load, put)
            else:
                put(i % steps, load(i % steps))

        barrier()  # what an earlier phase left is no longer read
        strided(self.heads * steps, self.thread, self.threads, one)
        barrier()

    def _cut(self, begin: Any, stop: Any, shift: Any) -> None:
        """The part's share, in whole pages, of the keys begin to stop; slots are keys + shift."""
        low, high = T.bind(begin + shift), T.bind(stop + shift)
        first = keep_int(T.shift_right(low, 4))
        pages = keep_int(T.max(T.shift_right(high + PAGE_SIZE - 1, 4) - first, 0))
        share = keep_int(truncdiv(pages + self.parts - 1, self.parts))
        page0 = keep_int(first + self.part * share)
        page1 = keep_int(T.min(first + pages, page0 + share))
        self.low = keep_int(T.max(low, page0 * PAGE_SIZE))
        self.high = keep_int(T.min(high, page1 * PAGE_SIZE))
        self.shift = shift
        steps = T.max(page1 - page0, 0) * PAGE_SIZE + self.threads - 1
        with T.serial(0, keep_int(steps // self.threads)) as t:
            self.slot0 = keep_int(page0 * PAGE_SIZE + t * self.threads)
            self._step()

    def _step(self) -> None:
        """Take a key a thread into the sums."""
        plan, heads, threads, thread = self.plan, self.heads, self.threads, self.thread
        scores = [Reg(f32(MASKED)) for _ in range(heads)]
        slot = keep_int(self.slot0 + thread)
        with when(T.bitwise_and(slot >= self.low, slot < self.high)):
            self._scores(slot, scores)
        for g, score in enumerate(scores):
            T.buffer_store(self.weights, score.get(), [g * threads + thread])
        barrier()
        self._reduce(T.max)
        barrier()
        with when(thread < self.states_held):
            top = Reg(self.top[thread])
            with T.serial(0, _WAYS) as i:
                top.set(T.max(top.get(), self.ways[thread * _WAYS + i]))
            T.buffer_store(self.decay, T.exp2(self.top[thread] - top.get()), [thread])
            T.buffer_store(self.top, top.get(), [thread])
        barrier()
        for g, score in enumerate(scores):
            one = keep(weight(score.get(), self.top[g]))
            T.buffer_store(self.weights, one, [g * threads + thread])
            T.buffer_store(self.mass, self.mass[g] * self.decay[g] + one, [g])
            T.buffer_store(self.acc, self.acc[g] * plan.splat(self.decay[g]), [g])
        barrier()
        self._values()
        barrier()

    def _scores(self, slot: Any, scores: list[Reg]) -> None:
        """The scores of a thread's key."""
        plan, chunks = self.plan, self.plan.chunks
        cell_at = self.keys.key_at(slot, self.head)
        sums = [Reg(plan.splat(0.0), plan.typed("float32")) for _ in scores]

        def load(chunk: Any) -> Any:
            return plan.cast(cell_at(chunk), "float32")

        def add(chunk: Any, vector: Any) -> None:
            for g, total in enumerate(sums):
                total.set(total.get() + vector * self.queries[g * chunks + chunk])

        half = self.rotation.half if self.rotation else 0
        if half:
            position = keep_int(self.k_base + slot - self.shift)
            with T.serial(0, half) as i:
                cosine, sine = self.rotation.angle(position, i)
                a, b = T.bind(load(i)), T.bind(load(i + half))
                add(i, keep(a * cosine - b * sine, plan.typed("float32")))
                add(i + half, keep(b * cosine + a * sine, plan.typed("float32")))
        rest = chunks - 2 * half
        together = next(n for n in (4, 2, 1) if rest % n == 0)  # reads that wait together
        with T.serial(0, rest // together) as i:
            chunk = 2 * half + i * together
            vectors = [T.bind(load(chunk + j)) for j in range(together)]
            for j, vector in enumerate(vectors):
                add(chunk + j, vector)
        for score, total in zip(scores, sums, strict=True):
            score.set(self.rule.capped(keep(plan.lane_sum(total.get()))))

    def _reduce(self, combine: Any) -> None:
        """ways[g, i] = all of weights[g, i], weights[g, i + 16], ..."""

        def one(i: Any) -> None:
            base = keep_int(i // _WAYS * self.threads + i % _WAYS)
            total = Reg(self.weights[base])
            with T.serial(1, self.threads // _WAYS) as j:
                total.set(combine(total.get(), self.weights[base + j * _WAYS]))
            T.buffer_store(self.ways, total.get(), [i])

        strided(self.heads * _WAYS, self.thread, self.threads, one)

    def _values(self) -> None:
        """acc[g] += weights V: a thread has a vector of a head's numbers and some of the keys."""
        plan, keys = self.plan, self.threads // self.plan.chunks
        own, chunk = T.bind(self.thread // plan.chunks), T.bind(self.thread % plan.chunks)
        first = keep_int(T.max(self.low - self.slot0, 0) + own)
        last = keep_int(T.min(self.high - self.slot0, self.threads))
        with when(own < keys):
            with T.serial(0, keep_int((T.max(last - first, 0) + keys - 1) // keys)) as j:
                key = T.bind(first + j * keys)
                value = self.keys.value_at(self.slot0 + key, self.head, chunk)
                value = keep(plan.cast(value, "float32"), plan.typed("float32"))
                for g in range(self.heads):
                    one = plan.splat(self.weights[g * self.threads + key])
                    T.buffer_store(self.acc, self.acc[g] + value * one, [g])

    def _finish(self) -> None:
        """Add up what the threads have; write outputs, or the part's sums."""
        plan, thread, chunks = self.plan, self.thread, self.plan.chunks
        for g in range(self.heads):
            T.buffer_store(self.weights, self.mass[g], [g * self.threads + thread])
        barrier()
        self._reduce(lambda a, b: a + b)
        for g in range(self.heads):
            barrier()
            T.buffer_store(self.crossing, self.acc[g], [thread])
            barrier()
            with when(T.bitwise_and(thread < chunks, self.first + g < self.config.group)):
                total = Reg(self.crossing[thread], plan.typed("float32"))
                with T.serial(1, self.threads // chunks) as j:
                    total.set(total.get() + self.crossing[j * chunks + thread])
                mass = Reg(f32(0.0))
                with T.serial(0, _WAYS) as j:
                    mass.set(mass.get() + self.ways[g * _WAYS + j])
                self._write(self.first + g, total.get(), keep(self.top[g]), mass.get())

    def _write(self, member: Any, total: Any, top: Any, mass: Any) -> None:
        """A thread's vector of a head's sums, and once a head what else there is."""
        c, chunks = self.config, self.plan.chunks
        if isinstance(self.parts, int):
            self._output(self.b, self.head, member, self.thread, total, top, mass)
            return
        row = keep_int((self.b * c.num_key_value_heads + self.head) * c.group + member)
        at = T.bind(row * self.parts + self.part)
        self.plan.store(self.sums, at * chunks + self.thread, total)
        with when(self.thread == 0):
            T.buffer_store(self.states, top, [at * 2])
            T.buffer_store(self.states, mass, [at * 2 + 1])

    def _output(
        self, b: Any, head: Any, member: Any, chunk: Any, total: Any, top: Any, mass: Any
    ) -> None:
        plan, c = self.plan, self.config
        first = T.bind(b * c.num_attention_heads + head * plan.stride)
        lse, inverse = log_sum(top, mass)
        plan.store(self.out, (first + member) * plan.chunks + chunk, total * plan.splat(inverse))
        with when(chunk == 0):
            T.buffer_store(self.lse, lse, [first + member])
            if c.returns_lse:
                emit_carried(plan, self.out, first, member, lse)

    def _merge(self, rows: Any) -> None:
        """The parts' sums become outputs."""
        plan, c, chunks = self.plan, self.config, self.plan.chunks
        together = self.threads // chunks
        with grid(self.threads, ceil_div(rows, together)) as (block, _, thread):
            row, chunk = T.bind(block * together + thread // chunks), T.bind(thread % chunks)
            with when(T.bitwise_and(thread < together * chunks, row < rows)):
                at = keep_int(row * self.parts)
                top, mass = Reg(f32(NO_KEY)), Reg(f32(0.0))
                total = Reg(plan.splat(0.0), plan.typed("float32"))
                with T.serial(0, self.parts) as part:
                    top.set(T.max(top.get(), self.states[(at + part) * 2]))
                with T.serial(0, self.parts) as part:
                    factor = keep(T.exp2(self.states[(at + part) * 2] - top.get()))
                    mass.set(mass.get() + factor * self.states[(at + part) * 2 + 1])
                    sums = plan.load(self.sums, (at + part) * chunks + chunk)
                    total.set(total.get() + sums * plan.splat(factor))
                of_kv, member = T.bind(row // c.group), T.bind(row % c.group)
                b = T.bind(of_kv // c.num_key_value_heads)
                head = T.bind(of_kv % c.num_key_value_heads)
                self._output(b, head, member, chunk, total.get(), top.get(), mass.get())
