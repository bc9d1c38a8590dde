"""The quantized module before any target lowering: it runs by TVM's own pipeline, and is right.

So a target has something to be compared with, and a mistake is either here or in its lowering.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SCHEMES = ("q4f16_1", "q3f16_0")


@pytest.fixture(scope="module")
def folder(checkpoint: Any) -> Path:
    """In-dimensions 84 and 172, no multiples of a group."""
    return Path(
        checkpoint(
            "llama",
            hidden_size=84,
            num_attention_heads=7,
            num_key_value_heads=1,
            head_dim=20,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="module", params=SCHEMES)
def reference(request: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(request.param, folder, tmp_path_factory.mktemp("reference"))


def made(scheme: str, folder: Path, where: Path) -> Any:
    """The module in TVM's virtual machine, its stored tensors, and the artifact with these."""
    import tvm
    from tvm import relax as rx

    from qcc.compiler.build import quantized_module, weight_specs
    from qcc.compiler.driver import convert_model, make_plan
    from qcc.compiler.options import CompileOptions
    from qcc.runtime.artifact import Artifact
    from qcc.targets import find_target

    options = CompileOptions(quant=scheme)
    out = where / "artifact"
    stored = Artifact.open(convert_model(str(folder), out, options))
    plan = make_plan(folder, options, 64)
    specs = weight_specs(plan)
    target = tvm.target.Target("llvm")
    module = quantized_module(plan, specs, find_target("cpu"), target)
    with target:
        vm = rx.VirtualMachine(rx.build(module, target), tvm.cpu())
    names = [part.name for spec in specs for part in spec.stored]
    params = [tvm.runtime.tensor(stored.read(name)) for name in names]
    return SimpleNamespace(
        vm=vm, params=params, artifact=out, scheme=scheme, module=module, plan=plan, specs=specs
    )


def embed(reference: Any, ids: list[int]) -> Any:
    import tvm

    return reference.vm["embed"](tvm.runtime.tensor(np.array(ids, "int32")), reference.params)


def logits(reference: Any, ids: list[int]) -> Any:
    """f32[n, V] of all positions of one sequence."""
    import tvm

    shape, call = tvm.runtime.ShapeTuple, tvm.get_global_func
    sizes = [shape([n]) for n in (1, 128, 64, 16, 0)]
    cache = reference.vm["create_tir_paged_kv_cache"](*sizes)
    call("vm.builtin.kv_state_add_sequence")(cache, 0)
    call("vm.builtin.kv_state_begin_forward")(cache, shape([0]), shape([len(ids)]))
    hidden = tvm.runtime.tensor(embed(reference, ids).numpy()[None])
    found, _ = reference.vm["batch_verify"](hidden, cache, reference.params)
    call("vm.builtin.kv_state_end_forward")(cache)
    return found.numpy()[0]


def test_rows_of_the_embedding(
    reference: Any, on_our_weights: Any, folder: Path, some_ids: Any
) -> None:
    """dequantize_rows, to the bit; ids past the table are clipped."""
    model = on_our_weights(reference.artifact, folder, reference.scheme)
    table = model.model.embed_tokens.weight.detach().numpy()
    ids = [*some_ids(20), 360, 361, -1, 2**31 - 1]
    found = embed(reference, ids).numpy()
    np.testing.assert_array_equal(found, table[np.clip(ids, 0, 360)])


def test_logits(
    reference: Any, on_our_weights: Any, folder: Path, logits_of: Any, some_ids: Any,
    tolerance: float,
) -> None:  # fmt: skip
    model = on_our_weights(reference.artifact, folder, reference.scheme)
    ids = some_ids(40)
    expected = logits_of(model, ids)
    assert np.abs(expected).max() > 4
    np.testing.assert_allclose(logits(reference, ids), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("reference", ["q3f16_0"], indirect=True)
def test_optimization_levels_agree(
    reference: Any, compiled: Any, folder: Path, some_ids: Any, same_library: float
) -> None:
    """O0 has generic schedules, O2 our kernels and fusion: the same numbers as the reference."""
    ids = some_ids(40)
    expected = logits(reference, ids)
    for opt in (0, 2):
        found = compiled(folder, reference.scheme, opt=opt).logits(ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=same_library, err_msg=f"O{opt}")


def test_only_dequantize_knows_the_format(reference: Any) -> None:
    """Every stored code goes through a PrimFunc that says its role and format."""
    from tvm import tirx

    roles: dict[str, set[int]] = {}
    for _, func in reference.module.functions_items():
        if isinstance(func, tirx.PrimFunc) and func.attrs and "qcc.format" in func.attrs:
            fmt = func.attrs["qcc.format"]
            roles.setdefault(str(func.attrs["qcc.role"]), set()).add(int(fmt["bits"]))
    bits = int(reference.scheme[1])
    assert roles == {"dequantize": {bits}, "dequantize_rows": {bits}}


MIXED = """
dtype: float16
linear: {bits: 2, group: 16, grid: asymmetric, scale_bits: 4}
embedding: 6/32
lm_head: {bits: 8, group: row, grid: asymmetric}
method: rtn
rules:
  "*.q_proj.weight": {bits: 5, group: 40, layout: KN}
  "*.v_proj.weight": float
  "*.gate_proj.weight": {bits: 4, group: 32, grid: zero_point}
  "*.layers.0.mlp.down_proj.weight": {bits: 3, group: 32, scale_bits: 6}
  "*.layers.1.mlp.down_proj.weight": {bits: 8, group: tensor, zero: 128}
"""


def stored_weights(reference: Any) -> dict[str, Any]:
    """Every weight of the artifact in f32, by packing.dequantize, which has tests of its own."""
    from qcc.quant_schemes.packing import dequantize
    from qcc.runtime.artifact import Artifact

    stored, weights = Artifact.open(reference.artifact), {}
    for spec in reference.specs:
        parts = [stored.read(part.name) for part in spec.stored]
        if spec.format.is_float:
            weights[spec.name] = parts[0].astype("float32")
            continue
        suffixes = [part.suffix for part in spec.format.stored(*spec.shape)]
        named = dict(zip(suffixes, parts, strict=True))
        weights[spec.name] = dequantize(named, spec.format, *spec.shape)
    return weights


def test_mixed_formats(
    folder: Path, contract: Any, hugging_face: Any, compiled: Any, logits_of: Any, some_ids: Any,
    tolerance: float, tmp_path: Path,
) -> None:  # fmt: skip
    """The sources of fused weights, each in its own format: transformers, reference, library."""
    scheme = tmp_path / "mixed.yaml"
    scheme.write_text(MIXED)
    reference = made(str(scheme), folder, tmp_path)
    formats = {spec.format for spec in reference.specs if not spec.format.is_float}
    assert len(formats) == 7 and sum(spec.fused is not None for spec in reference.specs) == 10

    ids = some_ids(40)
    expected = logits_of(
        contract.with_weights(hugging_face(folder), stored_weights(reference)), ids
    )
    np.testing.assert_allclose(logits(reference, ids), expected, rtol=0, atol=tolerance)
    llm = compiled(folder, str(scheme))
    np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(llm.logits(ids[:1])[0], expected[0], rtol=0, atol=tolerance)


def test_dynamic_activations(
    folder: Path, contract: Any, hugging_face: Any, compiled: Any, logits_of: Any, some_ids: Any,
    tolerance: float, tmp_path: Path,
) -> None:  # fmt: skip
    """Transformers with every linear layer's input rounded in numpy, reference, library.

    A number on the edge between two codes may fall to either side; the tokens after it see that.
    """
    import torch

    scheme = tmp_path / "dynamic.yaml"
    scheme.write_text("{dtype: float16, linear: 4/32, lm_head: 6/32, activations: dynamic}")
    reference = made(str(scheme), folder, tmp_path)
    model = contract.with_weights(hugging_face(folder), stored_weights(reference))
    ids = some_ids(40)
    floating = logits_of(model, ids)

    def rounded(_layer: Any, inputs: tuple[Any, ...]) -> Any:
        x = inputs[0].numpy()
        groups = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % 32)))
        groups = groups.reshape(*x.shape[:2], -1, 32)
        scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
        codes = np.rint(groups / np.where(scale == 0, 1, scale)).clip(-127, 127)
        return torch.from_numpy((codes * scale).reshape(*x.shape[:2], -1)[..., : x.shape[-1]])

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(rounded)
    expected = logits_of(model, ids)
    llm = compiled(folder, str(scheme))
    for found in (logits(reference, ids), llm.logits(ids)):
        error = np.abs(found - expected).max(axis=1)
        assert np.mean(error <= tolerance) > 0.5 and error.max() < 0.5
    assert np.abs(floating - expected).max(axis=1).min() > 10 * tolerance
