"""Mixture of experts: a router, and linear layers of which each token uses a few.

The experts' weights of a projection are one matrix, expert below expert, so that number formats,
quantization and storage know nothing of experts. A layer is one function of role `expert_linear`,
which computes what it says anywhere; targets put kernels in its place that read only the experts
in use. Shapes: m tokens, s experts of each, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.tirx.script.builder import ir as T

from qcc.compiler.config import ConfigReader, ExpertsConfig, ModelConfig
from qcc.compiler.models.architecture import FUSED, Source, WeightSource, sources
from qcc.compiler.models.blocks import Linear, activation, scaled, take
from qcc.compiler.row_kernel import i64, local, row_kernel
from qcc.quant_schemes.attributes import EXPERT_LINEAR, ROLE, TOP_EXPERTS
from qcc.runtime.errors import QccError

Act = Callable[[nn.Tensor], nn.Tensor]  # [m, s, gate_up rows of an expert] -> [m, s, inner size]
Chosen = tuple[nn.Tensor, nn.Tensor]  # ids int32[m, s], weights f32[m, s]


def read_experts(
    reader: ConfigReader,
    count: tuple[str, int],
    per_token: int,
    size: tuple[str, int | None] = ("intermediate_size", None),
    **switches: Any,
) -> ExpertsConfig:
    """The experts of a config.json.

    Args:
        reader: of config.json.
        count: the key of the number of experts, and its default.
        per_token: num_experts_per_tok where the key is absent.
        size: the key of an expert's inner size, and its default.
        switches: the other fields of ExpertsConfig.

    Raises:
        QccError: a token cannot have so many experts.
    """
    for key in ("output_router_logits", "router_aux_loss_coef"):
        reader.get(key)  # of the training
    experts = reader.integer(*count)
    used = reader.integer("num_experts_per_tok", per_token)
    if used > experts:
        raise QccError(
            f"{reader.where}: num_experts_per_tok is {used}, of {experts} experts ({count[0]})"
        )
    return ExpertsConfig(experts, used, reader.integer(*size), **switches)


def expert_sources(renamed: dict[str, str] | None = None) -> Source:
    """`sources(renamed=renamed)`, and of experts.gate_up_proj.weight each expert's two parts.

    The tensors are experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1.gate_proj...
    """
    usual = sources(renamed=renamed)

    def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
        before, found, rest = name.rpartition(".experts.")
        if not found:
            return usual(config, name, shape)
        assert config.experts is not None, name
        leaf, _, kind = rest.partition(".")
        parts = FUSED.get(leaf, (leaf,))
        one = (shape[0] // (config.experts.count * len(parts)), *shape[1:])
        each = (
            usual(config, f"{before}.experts.{expert}.{part}.{kind}", one).sources
            for expert in range(config.experts.count)
            for part in parts
        )
        return WeightSource(tuple(tensor for tensors in each for tensor in tensors), whole=True)

    return source


class ExpertLinear(nn.Module):  # type: ignore[misc]
    """x @ (weight of an expert).T (+ its bias); weight [experts * n, k], bias [experts, n]."""

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool) -> None:
        """Make the parameters; an architecture keeps the bias floating."""
        self.rows = out_features
        self.weight = nn.Parameter((experts * out_features, in_features))
        self.bias = nn.Parameter((experts, out_features)) if bias else None

    def forward(self, x: nn.Tensor, ids: nn.Tensor) -> nn.Tensor:
        """x [m, k] or [m, s, k], ids int32[m, s] -> [m, s, n]."""

        def products(x: te.Tensor, weight: te.Tensor, ids: te.Tensor) -> te.Tensor:
            column = te.reduce_axis((i64(0), weight.shape[1]), name="column")

            def product(i: tirx.Var, s: tirx.Var, row: tirx.Var) -> tirx.Expr:
                of_x = x[i, s, column] if len(x.shape) == 3 else x[i, column]
                of_w = weight[ids[i, s].astype("int64") * self.rows + row, column]
                return te.sum(of_x.astype("float32") * of_w.astype("float32"), axis=column)

            out = te.compute((*ids.shape, i64(self.rows)), product, name="expert_linear")
            if x.dtype == "float32":
                return out
            return te.compute(out.shape, lambda *at: out[at].astype(x.dtype), name="cast")

        attrs = {ROLE: EXPERT_LINEAR}
        y = op.tensor_expr_op(products, "expert_linear", [x, self.weight, ids], attrs=attrs)
        return y + take(self.bias, ids, axis=0) if self.bias is not None else y


class Router(Linear):
    """Which experts a token uses, and with which weights; every number is f32."""

    def __init__(self, config: ModelConfig, bias: bool = False) -> None:
        """Make the weight [experts, h]; an architecture keeps it floating."""
        assert config.experts is not None
        self.experts = config.experts
        super().__init__(config.hidden_size, config.experts.count, bias)

    def forward(self, x: nn.Tensor) -> Chosen:
        """x [m, h] -> ids int32[m, s], weights f32[m, s]."""
        scores = self.scores(super().forward(x).astype("float32"))
        ids = top_experts(self.choices(scores), self.experts.per_token)
        weights = chosen(scores, ids)
        if self.experts.normalized:
            weights = weights / op.sum(weights, axis=-1, keepdims=True)
        return ids, scaled(weights, self.experts.weight_scale)

    def scores(self, logits: nn.Tensor) -> nn.Tensor:
        """f32[m, experts] of the logits: their softmax."""
        return op.softmax(logits, axis=-1)

    def choices(self, scores: nn.Tensor) -> nn.Tensor:
        """f32[m, experts] whose largest numbers decide."""
        return scores


def chosen(scores: nn.Tensor, ids: nn.Tensor) -> nn.Tensor:
    """f32[m, s]: of scores f32[m, n] those with the numbers int32[m, s]."""

    def compute(scores: te.Tensor, ids: te.Tensor) -> te.Tensor:
        return te.compute(ids.shape, lambda i, s: scores[i, ids[i, s]], name="chosen")

    return op.tensor_expr_op(compute, "chosen", [scores, ids])


def of_best_groups(choices: nn.Tensor, groups: nn.Tensor, count: int) -> nn.Tensor:
    """f32[m, experts]: as it is in the `count` groups of the best scores f32[m, g], else lowest."""
    size = int(choices.shape[1]) // int(groups.shape[1])

    def compute(choices: te.Tensor, best: te.Tensor) -> te.Tensor:
        def value(i: tirx.Var, expert: tirx.Var) -> tirx.Expr:
            group = tirx.floordiv(expert, i64(size)).astype("int32")
            found = tirx.any(*(best[i, i64(rank)] == group for rank in range(count)))
            # finite: WGSL has no infinities
            return tirx.Select(found, choices[i, expert], tirx.min_value("float32"))

        return te.compute(choices.shape, value, name="of_best_groups")

    return op.tensor_expr_op(compute, "of_best_groups", [choices, top_experts(groups, count)])


def top_experts(scores: nn.Tensor, count: int) -> nn.Tensor:
    """The ids int32[m, count] of the largest of f32[m, experts], largest first.

    Of equal scores the first expert's comes first; torch.topk leaves their order open. Where NaN
    is among the scores the ids are some experts.
    """
    m, experts = scores.shape
    out = nn.Tensor.placeholder((m, count), "int32")
    return op.tensor_ir_op(_top_experts_func(int(experts), count), TOP_EXPERTS, [scores], out)


@cache
def _top_experts_func(experts: int, count: int) -> tirx.PrimFunc:
    """PrimFunc (f32[m, experts]) -> int32[m, count]."""
    m = tirx.Var("m", "int64")

    def body(row: Any, scores: Any, ids: Any) -> None:
        last, last_id = local("float32", 0.0), local("int32", -1)
        with T.serial(0, count) as slot:
            best, best_id = local("float32", 0.0), local("int32", -1)
            with T.serial(0, experts) as expert:
                score = T.bind(scores[row, expert])
                # In the order of falling scores and rising ids: behind the last that was taken.
                tied = T.And(score == last[0], expert > last_id[0])
                better = T.Or(best_id[0] < 0, score > best[0])
                behind = T.Or(last_id[0] < 0, T.Or(score < last[0], tied))
                with T.If(T.And(behind, better)):
                    with T.Then():
                        T.buffer_store(best, score, [0])
                        T.buffer_store(best_id, expert, [0])
            T.buffer_store(ids, T.max(best_id[0], 0), [row, slot])
            T.buffer_store(last, best[0], [0])
            T.buffer_store(last_id, best_id[0], [0])

    inputs, outputs = [("scores", (m, experts), "float32")], [("ids", (m, count), "int32")]
    return row_kernel(TOP_EXPERTS, m, inputs, outputs, body)


class Experts(nn.Module):  # type: ignore[misc]
    """down(act(gate_up(x))) of each token's experts, their sum by the router's weights."""

    def __init__(self, config: ModelConfig, act: Act | None = None, bias: bool = False) -> None:
        """Make gate_up_proj and down_proj; `act` None: the config's, of gate, times up."""
        assert config.experts is not None
        count, inner = config.experts.count, config.experts.intermediate_size
        self.act = act or _gated(config.hidden_act)
        self.gate_up_proj = ExpertLinear(count, config.hidden_size, 2 * inner, bias)
        self.down_proj = ExpertLinear(count, inner, config.hidden_size, bias)

    def forward(self, x: nn.Tensor, ids: nn.Tensor, weights: nn.Tensor) -> nn.Tensor:
        """x [m, h], ids int32[m, s], weights f32[m, s] -> [m, h]."""
        return weighted_sum(self.down_proj(self.act(self.gate_up_proj(x, ids)), ids), weights)


def _gated(name: str) -> Act:
    def act(x: nn.Tensor) -> nn.Tensor:
        gate, up = op.split(x, 2, axis=-1)
        return activation(name, gate) * up

    return act


def weighted_sum(x: nn.Tensor, weights: nn.Tensor) -> nn.Tensor:
    """x [m, s, h], weights f32[m, s] -> [m, h], summed over s in f32."""

    def compute(x: te.Tensor, weights: te.Tensor) -> te.Tensor:
        def total(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            # Written out, not a reduction, so that schedulers vectorize over j.
            terms = [
                x[i, i64(s), j].astype("float32") * weights[i, i64(s)]
                for s in range(int(x.shape[1]))
            ]
            return sum(terms[1:], terms[0]).astype(x.dtype)

        return te.compute((x.shape[0], x.shape[2]), total, name="weighted_sum")

    return op.tensor_expr_op(compute, "weighted_sum", [x, weights])


class MoE(nn.Module):  # type: ignore[misc]
    """The experts in an MLP's place: a router as `gate`, and `experts`."""

    def __init__(
        self,
        config: ModelConfig,
        router: Callable[[ModelConfig], nn.Module] = Router,
        experts: Callable[[ModelConfig], nn.Module] = Experts,
    ) -> None:
        """Make both."""
        self.gate = router(config)
        self.experts = experts(config)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, t, h] -> [b, t, h]."""
        b, t, h = x.shape
        return op.reshape(self.of_tokens(op.reshape(x, (b * t, h))), (b, t, h))

    def of_tokens(self, x: nn.Tensor) -> nn.Tensor:
        """x [m, h] -> [m, h]."""
        return self.experts(x, *self.gate(x))
