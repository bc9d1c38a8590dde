"""The pipeline: one list, read top to bottom. What a target adds comes from TargetSpec.passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from qcc.compiler.passes.attach_kv_cache import AttachKVCache
from qcc.compiler.passes.attach_logit_processing import AttachLogitProcessing
from qcc.compiler.passes.attach_metadata import AttachMetadata
from qcc.compiler.passes.attach_sampling import AttachSampling
from qcc.compiler.passes.attach_text_attention import AttachTextAttention
from qcc.compiler.passes.bound_shapes import BoundShapes
from qcc.compiler.passes.dump_ir import DumpIR
from qcc.compiler.passes.hoist_repack import HoistRepack
from qcc.compiler.passes.quantize_activations import QuantizeActivations
from qcc.compiler.passes.quantize_weights import QuantizeWeights
from qcc.quant_schemes.attributes import SCHEDULED


def front_end(
    quantize: QuantizeWeights,
    activations: QuantizeActivations,
    kv_cache: AttachKVCache,
    sampling: AttachSampling,
    logits: AttachLogitProcessing,
) -> list[Any]:
    """Float module -> quantized module with all that clients call; runs where its kernels do."""
    return [quantize, activations, kv_cache, sampling, logits]


def texts_front_end(
    quantize: QuantizeWeights,
    activations: QuantizeActivations,
    attention: AttachTextAttention,
) -> list[Any]:
    """The same for an embedding model, which has neither a cache nor logits."""
    return [quantize, activations, attention]


def lowering(
    bounds: dict[str, int],
    target_lower: Sequence[Any],
    hoist: HoistRepack,
    target_schedule: Sequence[Any],
    metadata: AttachMetadata,
    fuse: bool = True,
) -> list[Any]:
    """Quantized module -> VM module for one target."""
    t = rx.transform
    return [
        # our kernels, and weights repacked at load
        *target_lower,
        hoist,
        BoundShapes(bounds),
        # the rest: loops, fused and scheduled
        t.RemoveRedundantReshape(),
        t.EliminateCommonSubexpr(),
        t.LegalizeOps(),
        t.AnnotateTIROpPattern(),
        *([t.FuseOps(), t.FuseTIR()] if fuse else []),
        t.DeadCodeElimination(),
        *target_schedule,
        CheckScheduled(),
        # memory: planned with the bounds, reported in the metadata
        t.RewriteDataflowReshape(),
        t.DeadCodeElimination(),  # the loops of reshapes that are views now
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        metadata,
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


@tvm.transform.module_pass(opt_level=0, name="CheckScheduled")
class CheckScheduled:
    """Every PrimFunc must have been scheduled: plain loops are hundreds of times too slow."""

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Return the module as it is, or stop with the names of the forgotten."""
        forgotten = [
            str(gv.name_hint)
            for gv, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc) and not (func.attrs and SCHEDULED in func.attrs)
        ]
        assert not forgotten, f"no schedule for {', '.join(forgotten)}"
        return mod


def run(
    mod: tvm.IRModule, passes: Sequence[Any], target: Any, dump: Path | None = None
) -> tvm.IRModule:
    """Apply the passes in order for `target`; `dump` receives the module after each.

    The IR is checked on entry and exit: a broken pass is found here and not by what it computes.
    """
    instruments = [DumpIR(dump)] if dump else []
    rx.analysis.well_formed(mod)
    with target, tvm.transform.PassContext(opt_level=3, instruments=instruments):
        mod = tvm.transform.Sequential(list(passes))(mod)
    rx.analysis.well_formed(mod)
    return mod
