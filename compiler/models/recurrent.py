"""Models whose layers keep a state of fixed size beside, or instead of, keys and values of tokens.

The states are plain tensors that the functions take and write in place, one place a sequence. TVM's
RNN state object would copy every state out and back at each step, three times the memory that
decoding reads and writes, and knows neither how many tokens each sequence of a chunk has nor forks
at a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qcc.compiler.models.decoder import CausalLM


@dataclass(frozen=True)
class Hybrid:
    """A cache of keys and values, and by their names the states of all sequences.

    It stands where layers expect the cache: those with attention need not know of the rest.
    `segments` int32[b, 3] has of each sequence its place among the states, its first row and its
    number of rows.
    """

    kv: PagedKVCache
    states: dict[str, nn.Tensor]
    segments: nn.Tensor

    def attention_with_fused_qkv(self, *args: Any) -> nn.Tensor:
        """Of the cache."""
        return self.kv.attention_with_fused_qkv(*args)

    def get_query_positions(self, tokens: tirx.Expr) -> nn.Tensor:
        """Of the cache."""
        return self.kv.get_query_positions(tokens)

    def scan(
        self, name: str, func: tirx.PrimFunc, role: str, inputs: list[nn.Tensor], width: int
    ) -> nn.Tensor:
        """f32[m, width] of `func`(*inputs, segments, state `name`), which it changes."""
        state = self.states[name]
        out = nn.Tensor.placeholder((inputs[0].shape[0], width), "float32")
        new = nn.Tensor.placeholder(state.shape, "float32")
        args = [*inputs, self.segments, state]
        _, found = op.tensor_ir_inplace_op(func, role, args, [len(args) - 1, -1], [new, out])
        return found


class RecurrentLM(CausalLM):
    """CausalLM whose functions take `states`, f32[places, *shape] each, and `segments` as well."""

    def spec(self, dtype: str) -> dict[str, Any]:
        """Of CausalLM, with what every function that takes a cache takes behind it."""
        functions = super().spec(dtype)
        with_cache = [name for name, fields in functions.items() if "kv" in fields]
        return functions | {name: self._method(name, functions[name]) for name in with_cache}

    def _method(self, name: str, fields: dict[str, Any]) -> nn.spec.MethodSpec:
        """One of CausalLM's functions, given a `Hybrid` in the cache's place."""
        names, usual = [state.name for state in self.config.states], getattr(self, name)

        def method(*args: Any) -> tuple[nn.Tensor, PagedKVCache]:
            *before, kv, states, segments = args
            hybrid = Hybrid(kv, dict(zip(names, states, strict=True)), segments)
            return usual(*before, hybrid)[0], kv

        mode = fields.pop("$")
        batch = "b" if name in ("batch_prefill", "batch_decode") else 1
        every = [nn.spec.Tensor(["places", *s.shape], "float32") for s in self.config.states]
        specs = {
            **fields,
            "states": nn.spec.Tuple("states", every),
            "segments": nn.spec.Tensor([batch, 3], "int32"),
        }
        return nn.spec.MethodSpec(method, list(specs), list(specs.values()), **mode)
