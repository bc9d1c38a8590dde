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


def made(scheme: str, folder: Path, where: Path, **fields: Any) -> Any:
    """The module in TVM's virtual machine, its stored tensors, and the artifact with these."""
    import tvm
    from tvm import relax as rx

    from qcc.compiler.build import quantized_module, weight_specs
    from qcc.compiler.driver import convert_model, make_plan
    from qcc.compiler.options import CompileOptions
    from qcc.runtime.artifact import Artifact
    from qcc.targets import find_target

    options = CompileOptions(quant=scheme, **fields)
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
        parts = [stored.read(part.name) for part in spec.numbers]
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


STATIC = """
dtype: float16
linear: 4/32
embedding: 8/row
lm_head: 8/row
method: gptq
activations: static
rules:
  "*.k_proj.weight": 8/row
  "*.v_proj.weight": float
  "*.up_proj.weight": {bits: 6, group: 32, layout: KN}
"""


@pytest.mark.parametrize("case", ["whole", "apart"])
def test_static_activations(
    case: str, folder: Path, checkpoint: Any, contract: Any, hugging_face: Any, logits_of: Any,
    some_ids: Any, static_scheme: str, tolerance: float, tmp_path: Path,
) -> None:  # fmt: skip
    """Scales are the largest inputs on the text / 127; then as for dynamic ones.

    "whole": a method that needs no text, biases, an untied head. "apart": one that needs it,
    sources of a fused weight with a scale each, a tied head, whose input is not rounded.
    """
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import Calibration, CompileOptions
    from qcc.runtime import LLM
    from qcc.runtime.artifact import Artifact

    scheme = static_scheme
    if case == "apart":
        folder, scheme = checkpoint("llama"), str(tmp_path / "static.yaml")
        Path(scheme).write_text(STATIC)
    text = tmp_path / "text.txt"
    drawn = np.random.default_rng(1).integers(33, 127, 600).astype("u1")
    text.write_bytes(drawn.tobytes())
    calibration = Calibration(str(text))
    reference = made(scheme, folder, tmp_path, calibration=calibration)
    weights = stored_weights(reference)
    model = contract.with_weights(hugging_face(folder), weights)
    linear = {n for n, m in model.named_modules() if type(m).__name__ == "Linear"}
    left = {n for n in linear if case == "apart" and n.endswith(("v_proj", "lm_head"))}

    artifact, scales = Artifact.open(reference.artifact), dict[str, Any]()
    for name in artifact.records:
        if name.endswith("q_input_scale"):
            weight = name.removesuffix("q_input_scale") + "weight"
            (spec,) = (spec for spec in reference.specs if spec.name == weight)
            for source in spec.sources:
                scales[source.name.removesuffix(".weight")] = artifact.read(name)[0]
    assert scales.keys() == linear - left and len(left) == {"whole": 0, "apart": 3}[case]

    # The embedding is rounded after the calibration; norms and v_proj lose bits to f16.
    table = "model.embed_tokens.weight"
    original = hugging_face(folder).state_dict()[table].numpy()
    calibrated = contract.with_weights(model, {**weights, table: original})
    largest = largest_inputs(calibrated, windows_of_bytes(folder, drawn.tobytes().decode()))
    for name, scale in scales.items():
        np.testing.assert_allclose(scale * 127, largest[name], rtol=2e-3, err_msg=name)

    ids = some_ids(40)
    floating = logits_of(model, ids)
    round_inputs(model, scales)
    expected = logits_of(model, ids)
    options = CompileOptions(quant=scheme, calibration=calibration)
    llm = LLM(compile_model(str(folder), reference.artifact, options), precision="high")
    for found in (logits(reference, ids), llm.logits(ids)):
        error = np.abs(found - expected).max(axis=1)
        assert np.mean(error <= tolerance) > 0.5 and error.max() < 0.5
    assert np.abs(floating - expected).max(axis=1).min() > 10 * tolerance


def windows_of_bytes(folder: Path, text: str) -> list[list[int]]:
    """The text behind BOS, as often as 256 tokens are full."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert len(ids) == len(text)
    return [[1, *ids[at : at + 255]] for at in range(0, len(ids), 255)]


def largest_inputs(model: Any, windows: list[list[int]]) -> dict[str, float]:
    """Module -> the largest |x| that it is given."""
    import torch

    found: dict[str, float] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):

            def note(_layer: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                found[name] = max(found.get(name, 0.0), float(inputs[0].abs().max()))

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def round_inputs(model: Any, scales: dict[str, Any]) -> None:
    """Round what modules are given, in numpy f32, from now on."""
    import torch

    for name, scale in scales.items():

        def rounded(_layer: Any, inputs: tuple[Any, ...], scale: Any = scale) -> Any:
            codes = np.rint(inputs[0].numpy() / scale).clip(-127, 127)
            return torch.from_numpy(codes * scale)

        model.get_submodule(name).register_forward_pre_hook(rounded)
