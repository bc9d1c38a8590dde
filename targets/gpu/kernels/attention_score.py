"""From products of queries and keys to scores, weights and log-sum-exps.

Scores are in base 2 (scale * log2 e is folded into the query), f32 throughout. A row that sees no
key gives zeros and a log-sum-exp of NO_KEY, so that merging with another part leaves that one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.gpu.kernels.attention_func import Plan, f32, keep, when
from qcc.targets.spec import KVCacheConfig

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
NO_KEY = -1.0e30  # log-sum-exp of a row without keys, and the running maximum before the first key
MASKED = -3.0e38  # a masked score
LEAST_F16 = -65504.0
EVERYTHING = 1 << 30  # more than any position


@dataclass(frozen=True)
class ScoreRule:
    """From q . k to a score, and how far back a layer sees; of both, a call says `sm_scale`."""

    config: KVCacheConfig
    sm_scale: Any

    def factor(self) -> Any:
        """What q . k is multiplied by, so that `capped` turns it into a score in base 2."""
        cap = self.config.logit_soft_cap
        scale = self.sm_scale
        if self.config.layer_window:
            scale = T.max(scale, f32(0.0) - scale)
        return keep(scale * f32(1 / cap if cap else LOG2_E))

    def capped(self, score: Any) -> Any:
        """The soft cap: in base 2, c * log2 e * tanh(score / c)."""
        cap = self.config.logit_soft_cap
        return _tanh(keep(score)) * f32(cap * LOG2_E) if cap else score

    def oldest(self, position: Any) -> Any:
        """The first position that a query sees; far below 0 in a layer without a window."""
        reach = T.Select(self.sm_scale < f32(0.0), self.config.layer_window, EVERYTHING)
        return position - reach + 1


def _tanh(x: Any) -> Any:
    """tanh x; a GPU's own may overflow for a large x.

    (1 - t) / (1 + t) with t = e^(-2 |x|), for small x the first terms of the series: nothing
    cancels, so a small x keeps its precision.
    """
    size = keep(T.max(x, f32(0.0) - x))
    t = keep(T.exp2(T.max(size * f32(-2 * LOG2_E), f32(-40.0))))
    square = keep(x * x)
    series = f32(2 / 15) - square * f32(17 / 315)
    series = f32(1.0) - square * (f32(1 / 3) - square * series)
    ratio = keep((f32(1.0) - t) / (f32(1.0) + t))
    far = T.Select(x < f32(0.0), f32(0.0) - ratio, ratio)
    return T.Select(size < f32(0.15), x * series, far)


def weight(score: Any, top: Any) -> Any:
    """2^(score - top), 0 for a masked score: exp2 may stop at the smallest normal number."""
    return T.Select(score > f32(NO_KEY), T.exp2(T.max(score, f32(NO_KEY)) - top), f32(0.0))


def log_sum(top: Any, mass: Any) -> tuple[Any, Any]:
    """(log-sum-exp, 1 / mass) of a row; NO_KEY and 0 where no key was seen."""
    seen = mass > f32(0.0)
    safe = keep(T.Select(seen, mass, f32(1.0)))
    lse = keep(T.Select(seen, top + T.log2(safe), f32(NO_KEY)))
    return lse, keep(T.Select(seen, f32(1.0) / safe, f32(0.0)))


def emit_carried(plan: Plan, out: Any, first: Any, member: Any, lse: Any) -> None:
    """Put the log-sum-exp (base 2) of a head of a group into the group's carrier.

    Args:
        plan: of a cache that returns them.
        out: the output, numbers.
        first: its row of the group's first head.
        member: the head's number in the group; head 0 clears what no head fills.
        lse: a scalar.
    """
    c = plan.config
    base = T.bind((first + c.group) * c.head_dim)
    # f16 has no NO_KEY; where no key was seen the other part will overwrite it.
    natural = T.max(lse * f32(LN_2), f32(LEAST_F16))
    T.buffer_store(out, T.Cast(c.dtype, natural), [base + member])
    if c.group < c.head_dim:
        with when(member == 0), T.serial(c.group, c.head_dim) as d:
            T.buffer_store(out, T.Cast(c.dtype, f32(0.0)), [base + d])
