"""Factors on columns: where they are taken back, and that the model stays what it was."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qcc.compiler.build import weight_specs
from qcc.compiler.calibrate.folds import Fold, find_folds
from qcc.compiler.calibrate.layers import LayerwiseModel
from qcc.compiler.calibrate.matrices import sources_from
from qcc.compiler.calibrate.run import quantize_layers
from qcc.compiler.driver import make_plan
from qcc.compiler.options import CompileOptions
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, dequantize
from qcc.quant_schemes.rounding import awq
from qcc.quant_schemes.rounding.method import Inputs, Method

GATED = [
    (("input_layernorm",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (("post_attention_layernorm",), ("mlp.gate_proj", "mlp.up_proj")),
    (("mlp.up_proj",), ("mlp.down_proj",)),
]
NEOX = [
    (("input_layernorm",), ("attention.query_key_value",)),
    (("post_attention_layernorm",), ("mlp.dense_h_to_4h",)),
]


def loaded(folder: Path) -> tuple[LayerwiseModel, str, Callable[[], Any]]:
    """A model with its first layer in memory, the layer's name, a run of it."""
    model = LayerwiseModel(folder, device="cpu")
    for name in model.names_of_layer(0):
        model.load(name)
    x = torch.randn((2, 7, model.width), generator=torch.Generator().manual_seed(0))
    return model, f"{model.prefix}.0", lambda: model.run_layer(0, x)


@pytest.mark.parametrize(
    ("arch", "expected"), [("llama", GATED), ("qwen2", GATED), ("gpt_neox", NEOX)]
)
def test_folds_are_found_by_running(
    arch: str, expected: list[Any], checkpoint: Callable[..., Path]
) -> None:
    """Each fold, and the layer with random factors folded: the same numbers."""
    model, prefix, run = loaded(checkpoint(arch))
    found = find_folds(model, prefix, run)
    names = [
        (
            tuple(dict.fromkeys(p.rpartition(".")[0] for p in fold.producers)),
            fold.modules,
        )
        for fold in found
    ]
    full = [
        (tuple(f"{prefix}.{p}" for p in made), tuple(f"{prefix}.{m}" for m in modules))
        for made, modules in expected
    ]
    assert sorted(names) == sorted(full)
    before = run()
    for fold in found:
        k = model.get(f"{fold.modules[0]}.weight").shape[1]
        old = model.get(f"{fold.modules[0]}.weight")
        factors = torch.rand(k, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
        assert fold.apply(model, factors, run)
        np.testing.assert_allclose(model.get(f"{fold.modules[0]}.weight"), old * factors)
    np.testing.assert_allclose(run(), before, atol=1e-4 * float(before.abs().max()), rtol=0)


def test_a_fold_that_changes_the_layer_is_undone(checkpoint: Callable[..., Path]) -> None:
    """A norm that makes another input is no place for the factors."""
    model, prefix, run = loaded(checkpoint("llama"))
    before = {name: model.get(name) for name in model.names_of_layer(0)}
    fold = Fold((f"{prefix}.input_layernorm.weight",), (f"{prefix}.mlp.gate_proj",))
    assert not fold.apply(model, torch.full((model.width,), 2.0), run)
    assert all(model.get(name) is numbers for name, numbers in before.items()) or all(
        torch.equal(model.get(name), numbers) for name, numbers in before.items()
    )


def logits_with(folder: Path, specs: Sequence[Any], given: Any, *windows: Sequence[int]) -> Array:
    """Transformers' logits f32[n, V] of all windows, the given weights in their places."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for spec in specs:
            parts = given(spec)
            if parts is None:
                continue
            numbers = dequantize(parts, spec.format, spec.shape[0], spec.shape[-1])
            for source, part in sources_from(spec, numbers.reshape(spec.shape)).items():
                model.get_parameter(source).copy_(torch.from_numpy(part))
        found = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in windows]
    logits: Array = torch.cat(found).numpy()
    return logits


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_scaled_columns_and_norms_belong_together(
    arch: str,
    checkpoint: Callable[..., Path],
    hugging_face: Callable[[Path], Any],
    logits_of: Callable[[Any, list[int]], Any],
    some_ids: Callable[..., list[int]],
    tmp_path: Path,
) -> None:
    """At 8 bits the model with wild factors computes what the original does; norms are given."""
    folder, ids = checkpoint(arch, tie_word_embeddings=True), some_ids(50)
    specs = weight_specs(make_plan(folder, CompileOptions(quant="q8f32_1"), 64))
    rng, used = np.random.default_rng(0), list[int]()

    def factors(weights: Sequence[Array], formats: Sequence[WeightFormat], inputs: Inputs) -> Array:
        assert len(weights) == len(formats) and all(f.bits == 8 for f in formats)
        used.append(len(inputs.square))
        return rng.uniform(0.3, 3, len(inputs.square)).astype(np.float32)

    method = replace(awq.METHOD, scales=factors)
    windows = [some_ids(40, seed=seed) for seed in range(4)]
    given = quantize_layers(folder, specs, method, windows, tmp_path, device="cpu")
    hidden = 64 if arch == "llama" else 96
    assert used == ([hidden, hidden, 172] * 2 if arch == "llama" else [hidden] * 4)
    changed = {spec.name for spec in specs if spec.format.is_float and given(spec) is not None}
    norms = {spec.name for spec in specs if "layernorm" in spec.name}
    assert norms <= changed
    expected = logits_of(hugging_face(folder), ids)
    found = logits_with(folder, specs, given, ids)
    # 8 bits under factors of a ratio of 10 round as 5 bits do; a norm left alone makes all wrong.
    assert np.abs(found - expected).mean() < 0.08 * np.abs(expected).mean()

    def none(*_: Any) -> Array:
        raise AssertionError("a finished calibration calls nothing")

    idle = Method("idle", none, needs_text=True, scales=none)
    again = quantize_layers(folder, specs, idle, windows, tmp_path, device="cpu")
    np.testing.assert_array_equal(logits_with(folder, specs, again, ids), found)


def with_outliers(folder: Path, out: Path) -> Path:
    """The same model, in which norms make some inputs 20 times as large as their columns want."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    users = {"input_layernorm": ("self_attn.q", "self_attn.k", "self_attn.v")}
    users["post_attention_layernorm"] = ("mlp.gate", "mlp.up")
    for layer in ("model.layers.0", "model.layers.1"):
        for norm, names in users.items():
            tensors[f"{layer}.{norm}.weight"][::9] *= 20
            for name in names:
                tensors[f"{layer}.{name}_proj.weight"][:, ::9] /= 20
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_awq_saves_what_outliers_need(
    checkpoint: Callable[..., Path], some_ids: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Small columns of large inputs, 4 bits: scaled, the logits err less than half as much."""
    folder = with_outliers(checkpoint("llama"), tmp_path / "outliers")
    specs = weight_specs(make_plan(folder, CompileOptions(quant="q4f16_1"), 64))
    windows, ids = [some_ids(60, seed=seed) for seed in range(6)], some_ids(60, seed=9)
    original = logits_with(folder, specs, lambda _: None, ids)

    def error(method: Method, work: Path) -> float:
        given = quantize_layers(folder, specs, method, windows, work, device="cpu")
        return float(((logits_with(folder, specs, given, ids) - original) ** 2).mean())

    plain = error(replace(awq.METHOD, scales=None), tmp_path / "plain")
    assert error(awq.METHOD, tmp_path / "awq") < 0.5 * plain
