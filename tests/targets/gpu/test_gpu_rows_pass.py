"""LowerRows: what it replaces, and the functions that clients call, as a library on lavapipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax as rx
from tvm import tirx

from qcc.compiler.passes import pipeline
from qcc.compiler.passes.attach_logit_processing import AttachLogitProcessing
from qcc.compiler.passes.attach_metadata import AttachMetadata
from qcc.compiler.passes.attach_sampling import AttachSampling
from qcc.compiler.passes.hoist_repack import HoistRepack
from qcc.quant_schemes.attributes import ROLE, SCHEDULED
from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.passes.lower_rows import KERNELS, LowerRows
from qcc.targets.webgpu import TARGET

from .attention_gpu import VULKAN, device

WIDTH, BATCH = 5001, 3
LOWEST = np.finfo("float32").min


def module() -> tvm.IRModule:
    """All functions over logits and nothing else."""
    return AttachLogitProcessing(WIDTH)(AttachSampling(WIDTH, BATCH)(tvm.IRModule()))


def test_every_kernel_of_rows_is_replaced() -> None:
    """By one of the same arguments, with threads; the softmax keeps its name and bounds."""
    before = module()
    after = LowerRows(Limits())(before)
    rx.analysis.well_formed(after)
    replaced = set()
    for gv, func in before.functions_items():
        if isinstance(func, tirx.PrimFunc) and ROLE in func.attrs:
            new = after[gv.name_hint]
            assert SCHEDULED in new.attrs and "threadIdx.x" in new.script()
            kinds = [[(p.dtype, len(p.shape)) for p in each.params] for each in (func, new)]
            assert kinds[0] == kinds[1]
            replaced.add(str(func.attrs[ROLE]))
    assert replaced == set(KERNELS)
    name = "softmax_with_temperature"
    assert dict(after[name].attrs["tir_var_upper_bound"]) == {"b": BATCH, "n": BATCH}
    assert after[name].attrs["global_symbol"] == name
    functions = [
        [gv.name_hint for gv, f in m.functions_items() if isinstance(f, rx.Function)]
        for m in (before, after)
    ]
    assert sorted(functions[0]) == sorted(functions[1])
    used = {gv.name_hint for gv in rx.transform.DeadCodeElimination()(after).get_global_vars()}
    assert "softmax_rows" in used and not any(n.startswith("softmax_part") for n in used)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the VM, its device)."""
    lower, schedule = (TARGET.passes(phase, VULKAN, 2) for phase in ("lower", "schedule"))
    metadata = AttachMetadata(lambda usage: {})
    passes = pipeline.lowering({}, lower, HoistRepack(), schedule, metadata)
    mod = pipeline.run(module(), passes, VULKAN)
    path = Path(tmp_path_factory.mktemp("rows")) / "rows.so"
    dev = device()
    with VULKAN:
        rx.build(mod, VULKAN, relax_pipeline=None).export_library(str(path))
    return rx.VirtualMachine(tvm.runtime.load_module(str(path)), dev), dev


def test_from_logits_to_tokens(library: Any) -> None:
    """Mask, bias and penalty in place, then softmax, sort and sample."""
    vm, dev = library

    def tensor(values: Any, dtype: str = "float32") -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(values, dtype), dev)

    logits = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype("float32") * 4
    on_device = tensor(logits)
    expected = logits.astype("float64")
    mask = np.full((BATCH, -(-WIDTH // 32)), -1, "int32")
    mask[1, 3:] = 0
    vm["apply_bitmask_inplace"](on_device, tensor([1], "int32"), tensor(mask, "int32"))
    expected[1, 96:] = LOWEST
    ids = tensor([0, 0, 2], "int32"), tensor([5, 5, 7], "int32")
    vm["apply_logit_bias_inplace"](on_device, *ids, tensor([1, 2, -30]))
    expected[0, 5] += 3
    expected[2, 7] -= 30
    entries = tensor([0], "int32"), tensor([5000], "int32"), tensor([2], "int32")
    same = vm["apply_penalty_inplace"](
        on_device, tensor([2], "int32"), *entries, tensor([[1, 0.5, 1]])
    )
    expected[2, 5000] -= 2
    np.testing.assert_allclose(same.numpy(), expected, rtol=1e-6, atol=1e-6)
    temperature = np.array([1, 0.5, 0])
    probs = vm["softmax_with_temperature"](
        tensor(same.numpy()[:, None]), tensor(temperature)
    ).numpy()
    scaled = expected / np.maximum(temperature, 1e-9)[:, None]
    exact = np.exp(scaled - scaled.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    np.testing.assert_allclose(probs[:, 0], exact, atol=1e-6)
    ordered, tokens = vm["argsort_probs"](tensor(probs[:, 0]))
    order = np.argsort(-probs[:, 0], axis=1, kind="stable")
    np.testing.assert_array_equal(tokens.numpy(), order)
    np.testing.assert_array_equal(ordered.numpy(), np.take_along_axis(probs[:, 0], order, 1))
    rows = tensor([0, 1, 2], "int32")
    sampled = vm["sample_with_top_p"](
        ordered, tokens, tensor([0, 0, 0.999]), rows, tensor([1, 0.9, 0.5])
    )
    np.testing.assert_array_equal(sampled.numpy(), order[:, 0])
