"""An artifact's weights as numbers: every layout, fused weights stored apart, permuted sources."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.compiler import stored_weights
from qcc.compiler.driver import convert_model
from qcc.compiler.reference import Original
from qcc.compiler.stored_weights import StoredWeights, relative_error
from qcc.runtime.artifact import Artifact
from qcc.runtime.errors import QccError


def converted(model: Path, quant: str, out: Path) -> StoredWeights:
    """The weights of a folder without a library."""
    from qcc.compiler.options import CompileOptions

    folder = convert_model(str(model), out, CompileOptions(quant=quant))
    return StoredWeights.open(Artifact.open(folder), Original(model))


def original(model: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(model / "model.safetensors"))


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_floating_weights_come_back_under_the_checkpoints_names(
    arch: str, checkpoint: Any, tmp_path: Path
) -> None:
    """GPT-NeoX permutes the rows of its fused projection: undone to the bit."""
    model = checkpoint(arch)
    found = converted(model, "q0f32", tmp_path / "a").by_source()
    wanted = original(model)
    assert set(found) == {n for n in wanted if not n.endswith((".rotary_emb.inv_freq",))}
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


@pytest.mark.parametrize("scheme", ["q4f16_0", "q3f16_1", "q4bf16_1"])
def test_blocks_of_rows_are_the_whole(
    scheme: str, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantized block by block as at once; near the original by half a step."""
    model = checkpoint("llama")
    weights = converted(model, scheme, tmp_path / "a")
    whole = [weights.dequantized(spec) for spec in weights.quantized()]
    monkeypatch.setattr(stored_weights, "BLOCK", 200)
    with weights.source.open() as opened:
        for spec, array in zip(weights.quantized(), whole, strict=True):
            np.testing.assert_array_equal(weights.dequantized(spec), array)
            step = np.abs(array).max() / (2 ** (spec.format.bits - 1) - 1)
            assert (
                np.abs(weights.original(spec, opened) - array).max() < 0.56 * step
            )  # half, and bf16 rounds by 7/256


def test_a_fused_weight_of_two_formats_is_read_apart(checkpoint: Any, tmp_path: Path) -> None:
    """v_proj has 8 bits beside q_proj and k_proj of 3: its error is smaller."""
    from qcc.compiler.options import CompileOptions

    model = checkpoint("llama")
    options = CompileOptions(quant="q3f16_1", rules=(("*.v_proj.*", "8/32a"),))
    folder = convert_model(str(model), tmp_path / "a", options)
    weights = StoredWeights.open(Artifact.open(folder), Original(model))
    errors = {spec.name: error for spec, error in weights.errors()}
    q, v = (errors[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qv")
    assert 0 < v < 0.01 < 0.1 < q
    found, wanted = weights.by_source(), original(model)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert relative_error(wanted[name], found[name]) == pytest.approx(errors[name], rel=1e-6)


def test_scales_of_inputs_are_no_part_of_a_weight(
    checkpoint: Any, static_scheme: str, tmp_path: Path
) -> None:
    """A static scheme's weights are those of the same scheme without; its norms are still f16."""
    from qcc.compiler.options import Calibration, CompileOptions

    model, text = checkpoint("llama"), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a text. " * 10)
    options = CompileOptions(quant=static_scheme, calibration=Calibration(str(text)))
    folder = convert_model(str(model), tmp_path / "static", options)
    static = StoredWeights.open(Artifact.open(folder), Original(model))
    plain = converted(model, "q8f16_c", tmp_path / "plain")
    assert static.plan.scheme.dtype == "float16"
    assert any(spec.input_scale for spec in static.specs)
    for spec, other in zip(static.specs, plain.specs, strict=True):
        np.testing.assert_array_equal(static.dequantized(spec), plain.dequantized(other))


def test_another_model_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("llama")
    weights = converted(model, "q4f16_1", tmp_path / "a")
    wider = checkpoint("llama", intermediate_size=204)
    with pytest.raises(QccError, match=r"was not compiled from .*: 'model\.layers\.0\.mlp\."):
        StoredWeights.open(weights.artifact, Original(wider))
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "config.json").write_text("[]")
    with pytest.raises(QccError, match="not a JSON object"):
        StoredWeights.open(weights.artifact, Original(bare))


def test_relative_error_of_known_numbers() -> None:
    """||(0, 1)|| / ||(3, 4)|| = 1/5; of zeros 0 or infinite."""
    w = np.array([[3.0, 4.0]], np.float32)
    assert relative_error(w, np.array([[3.0, 5.0]], np.float32)) == pytest.approx(0.2)
    nothing = np.zeros((1, 2), np.float32)
    assert relative_error(nothing, nothing) == 0.0
    assert relative_error(nothing, w) == float("inf")
