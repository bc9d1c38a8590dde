"""Scales of inputs (`activations: static`): the largest |x| of transformers' model over 127."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcc.compiler import codes
from qcc.compiler.build import weight_specs
from qcc.compiler.calibrate import states
from qcc.compiler.calibrate.inputs import Moments
from qcc.compiler.calibrate.matrices import sources_from
from qcc.compiler.calibrate.run import quantize_layers
from qcc.compiler.driver import make_plan
from qcc.compiler.options import Calibration, CompileOptions
from qcc.compiler.steps import Steps
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Quantized, dequantize
from qcc.quant_schemes.rounding import grid
from qcc.quant_schemes.rounding.method import Inputs, Method
from qcc.runtime.errors import QccError

LENGTHS = (60, 17, 33)


@pytest.fixture
def specs_of(static_scheme: str) -> Callable[[Path], tuple[WeightSpec, ...]]:
    return lambda folder: weight_specs(make_plan(folder, CompileOptions(quant=static_scheme), 64))


def nearest(weights: Array, fmt: WeightFormat, inputs: Inputs | None) -> Quantized:
    """Round to nearest; a method that needs no text is told of none."""
    assert inputs is None
    return grid.nearest(weights, grid.of_range(*grid.ranges(weights, fmt), fmt), fmt)


def largest_inputs(folder: Path, windows: Sequence[Sequence[int]], changed: Any) -> dict[str, Any]:
    """Linear module -> the largest |x| of transformers' model, `changed` weights put in."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: dict[str, float] = {}

    def note(name: str, _module: Any, args: tuple[Any, ...]) -> None:
        found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

    with torch.no_grad():
        for source, numbers in changed.items():
            name = source.removesuffix(".weight").replace("embed_out", "lm_head")
            model.get_submodule(name).weight.copy_(torch.from_numpy(numbers))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(partial(note, name))
        for window in windows:
            model(torch.tensor([window]), use_cache=False)
    return found


@pytest.mark.parametrize("arch", ["gpt_neox", "llama"])
def test_largest_inputs_of_the_quantized_model(
    arch: str, checkpoint: Any, specs_of: Any, some_ids: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """GPT-NeoX: permuted rows, an untied head. Llama: a tied head, which has no scale."""
    monkeypatch.setattr(states, "BATCH_TOKENS", 64)
    folder = checkpoint(arch)
    specs, windows = specs_of(folder), [some_ids(count, seed=count) for count in LENGTHS]
    method = Method("round to nearest", nearest)
    given = quantize_layers(folder, specs, method, windows, tmp_path, device="cpu")
    scales, changed = {}, {}
    for spec in specs:
        parts = given(spec)
        assert (parts is not None) == spec.input_scale
        if parts is None:
            continue
        assert list(parts) == ["q_weight", "q_scale", "q_input_scale"]
        scale = parts["q_input_scale"]
        assert (scale.shape, scale.dtype) == ((1,), np.float32)
        changed |= sources_from(spec, dequantize(parts, spec.format, *spec.shape))
        scales |= {source.name: scale[0] for source in spec.sources}
    largest = largest_inputs(folder, windows, changed)
    if arch == "llama":
        del largest["lm_head"]
    assert len(scales) == len(largest) == {"gpt_neox": 9, "llama": 14}[arch]
    for source, found in scales.items():
        name = source.removesuffix(".weight").replace("embed_out", "lm_head")
        np.testing.assert_allclose(found * 127, largest[name], rtol=1e-5, err_msg=name)


def test_an_interrupted_run_keeps_its_scales(
    checkpoint: Any, specs_of: Any, some_ids: Any, tmp_path: Path
) -> None:
    """The finished layer is not rounded again, and its scales are the same."""
    folder, windows = checkpoint("llama"), [some_ids(40)]
    specs = specs_of(folder)
    calls: list[int] = []

    def counted(fails_at: int | None, weights: Array, fmt: WeightFormat, inputs: Any) -> Quantized:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(1)
        return nearest(weights, fmt, inputs)

    def run(work: Path, fails_at: int | None = None) -> Callable[[WeightSpec], Any]:
        calls.clear()
        method = Method("", partial(counted, fails_at))
        return quantize_layers(folder, specs, method, windows, work, device="cpu")

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "work", 6)
    resumed = run(tmp_path / "work")
    assert len(calls) == 4
    for spec in specs:
        if spec.input_scale:
            found, wanted = (made(spec)["q_input_scale"] for made in (resumed, whole))
            np.testing.assert_array_equal(found, wanted)


def test_inputs_that_are_no_numbers() -> None:
    for bad in (np.nan, -np.inf):
        moments = Moments("layer", sums=False)
        moments.add(torch.tensor([[3.0, -5.0]]))
        with pytest.raises(QccError, match="layer: its inputs are NaN or infinite"):
            moments.add(torch.tensor([[bad, 1.0]]))
        assert moments.largest == 5.0


def test_codes_of_another_tool_are_kept(
    checkpoint: Any, specs_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the scale of their inputs; a method that needs no text rounds the embedding too."""
    folder = checkpoint("llama")
    specs = specs_of(folder)
    kept = {"q_weight": np.zeros(1), "q_scale": np.ones(1)}
    named = "model.layers.1.mlp.down_proj.weight"

    def imported(_checkpoint: Any, spec: WeightSpec) -> Any:
        return kept if spec.name == named else None

    monkeypatch.setattr(codes, "imported_parts", imported)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a text. " * 10)
    with Checkpoint.open(folder) as opened, ExitStack() as held:
        chosen = codes.choose_codes(
            "rtn", opened, specs, Calibration(str(text)), "0" * 64, 256, Steps(quiet=True), held
        )
        for spec in specs:
            parts = chosen.given(spec)
            assert (parts is not None) == spec.input_scale
            if parts is not None and spec.name == named:
                assert parts["q_input_scale"].dtype == np.float32 and len(parts) == 3
                assert all(parts[name] is kept[name] for name in kept)
    assert chosen.method.description.startswith("round")
    assert chosen.text is not None and chosen.text["name"] == "text.txt"
    chosen.forget()
