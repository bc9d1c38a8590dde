"""quantize_layers against transformers' whole model, whose weights are replaced one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcc.compiler.build import weight_specs
from qcc.compiler.calibrate.matrices import matrix_of, sources_from
from qcc.compiler.calibrate.run import quantize_layers
from qcc.compiler.driver import make_plan
from qcc.compiler.options import CompileOptions
from qcc.compiler.weights.spec import SourceTensor, WeightSpec
from qcc.quant_schemes.format import WeightFormat, float_format
from qcc.quant_schemes.packing import Array, Quantized, dequantize
from qcc.quant_schemes.rounding import grid
from qcc.quant_schemes.rounding.method import Inputs, Method
from qcc.runtime.errors import QccError

LENGTHS = (60, 17, 60, 33, 5)
# f32 sums of products against f64 ones, relative to the largest.
CLOSE = 2e-5


@dataclass
class Recorder:
    """A method that rounds to nearest and keeps what it was told."""

    calls: list[tuple[Array, Inputs]] = field(default_factory=list)
    fails_at: int | None = None

    def quantize(self, weights: Array, fmt: WeightFormat, inputs: Inputs | None) -> Quantized:
        assert inputs is not None
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((weights.copy(), inputs))
        return grid.nearest(weights, grid.of_range(*grid.ranges(weights, fmt), fmt), fmt)

    @property
    def method(self) -> Method:
        return Method("round to nearest", self.quantize, needs_text=True)


def specs_of(folder: Path, quant: str = "q3f16_1", **options: Any) -> tuple[WeightSpec, ...]:
    """The weights as a compile plans them."""
    return weight_specs(make_plan(folder, CompileOptions(quant=quant, **options), 64))


def windows_of(some_ids: Callable[..., list[int]]) -> list[list[int]]:
    return [some_ids(count, seed=count) for count in LENGTHS]


class Reference:
    """Transformers' model of which weights are replaced, and the moments of its inputs in f64."""

    def __init__(self, folder: Path, windows: Sequence[Sequence[int]]) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.windows = windows

    def module(self, source: str) -> Any:
        name = source.removesuffix(".weight").replace("embed_out", "lm_head")
        return self.model.get_submodule(name)

    def inputs(self, *sources: str) -> list[Array]:
        """f64[tokens, k] of all windows, one at a time, for each source."""
        found: list[list[Array]] = [[] for _ in sources]

        def note(at: int, _module: Any, args: tuple[Any, ...]) -> None:
            found[at].append(args[0][0].double().numpy())

        handles = [
            self.module(source).register_forward_pre_hook(partial(note, at))
            for at, source in enumerate(sources)
        ]
        with torch.no_grad():
            for window in self.windows:
                self.model(torch.tensor([window]), use_cache=False)
        for handle in handles:
            handle.remove()
        return [np.concatenate(each) for each in found]

    def replace(self, source: str, numbers: Array) -> None:
        with torch.no_grad():
            self.module(source).weight.copy_(torch.from_numpy(numbers))


ARCHITECTURES = {
    "llama": (("llama", {}), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mistral": (("mistral", {}), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "untied": (
        ("qwen2", {"tie_word_embeddings": False}),
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "gpt_neox": (("gpt_neox", {}), ["qkv_proj", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_inputs_are_those_of_the_quantized_model(
    case: str,
    checkpoint: Callable[..., Path],
    some_ids: Callable[..., list[int]],
    tmp_path: Path,
) -> None:
    """In the order of running, each weight is told of inputs made by all quantized before it."""
    (arch, fields), order = ARCHITECTURES[case]
    folder = checkpoint(arch, **fields)
    specs = {spec.name: spec for spec in specs_of(folder)}
    windows, recorder, told = windows_of(some_ids), Recorder(), list[str]()
    given = quantize_layers(
        folder,
        list(specs.values()),
        recorder.method,
        windows,
        tmp_path,
        lambda _stage, _stages, name, _left: told.append(name),
        device="cpu",
    )
    expected = [
        name
        for i in range(2)
        for part in order
        for name in specs
        if f".{i}." in name and name.endswith(f".{part}.weight")
    ]
    expected += [name for name in specs if specs[name].role == "lm_head"]
    assert told == expected
    assert {name for name, spec in specs.items() if given(spec) is not None} == set(told)

    reference = Reference(folder, windows)
    for name, (weights, inputs) in zip(told, recorder.calls, strict=True):
        spec = specs[name]
        whole = matrix_of(spec, lambda s: reference.module(s).weight.detach().numpy())
        np.testing.assert_array_equal(weights, whole)
        for x in reference.inputs(*(source.name for source in spec.sources)):
            assert inputs.count == len(x) == sum(LENGTHS)
            for found, mean in (
                (inputs.hessian, x.T @ x / len(x)),
                (inputs.square, (x**2).mean(axis=0)),
                (inputs.absolute, np.abs(x).mean(axis=0)),
            ):
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, mean, atol=CLOSE * np.abs(mean).max(), rtol=0)
        parts = given(spec)
        assert parts is not None
        numbers = dequantize(parts, spec.format, *spec.shape)
        for source_name, part in sources_from(spec, numbers).items():
            reference.replace(source_name, part)


def test_cross_moment_with_the_original(
    checkpoint: Callable[..., Path], some_ids: Callable[..., list[int]], tmp_path: Path
) -> None:
    """`original`: the mean of x y^T, y the inputs of the model as it was."""
    folder, windows = checkpoint("llama"), windows_of(some_ids)
    specs, recorder = specs_of(folder), Recorder()
    given = quantize_layers(
        folder, specs, recorder.method, windows, tmp_path, device="cpu", original=True
    )
    before, after = Reference(folder, windows), Reference(folder, windows)
    calls = iter(recorder.calls)
    for spec in specs:
        parts = given(spec) if spec.role == "linear" else None
        if parts is None:
            continue
        _, inputs = next(calls)
        (x,), (y,) = (side.inputs(spec.sources[0].name) for side in (after, before))
        mean = x.T @ y / len(x)
        assert inputs.cross is not None
        np.testing.assert_allclose(inputs.cross, mean, atol=CLOSE * np.abs(mean).max(), rtol=0)
        numbers = dequantize(parts, spec.format, *spec.shape)
        for source, part in sources_from(spec, numbers).items():
            after.replace(source, part)


def test_resumes_at_the_first_layer_that_is_not_whole(
    checkpoint: Callable[..., Path], some_ids: Callable[..., list[int]], tmp_path: Path
) -> None:
    """An interruption in layer 1 keeps layer 0; a damaged file has its layer made again."""
    folder, windows = checkpoint("llama"), windows_of(some_ids)
    specs = specs_of(folder, "q4bf16_1")  # bfloat16, which npz does not know

    def run(recorder: Recorder, work: Path) -> dict[str, dict[str, Array]]:
        given = quantize_layers(folder, specs, recorder.method, windows, work, device="cpu")
        every = {spec.name: given(spec) for spec in specs}
        return {name: dict(parts) for name, parts in every.items() if parts is not None}

    whole = run(Recorder(), tmp_path / "whole")
    interrupted, work = Recorder(fails_at=6), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, work)
    resumed = Recorder()
    assert_same(run(resumed, work), whole)
    assert len(resumed.calls) == 4  # those of layer 1
    again = Recorder()
    assert_same(run(again, work), whole)
    assert not again.calls

    victim = work / "model.layers.0.mlp.down_proj.weight.npz"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    repaired = Recorder()
    assert_same(run(repaired, work), whole)
    assert len(repaired.calls) == 4  # those of layer 0; layer 1 stands
    np.savez(victim, q_weight=np.zeros((64, 22), np.uint32), q_scale=np.zeros((64, 6), np.float16))
    repaired = Recorder()
    assert_same(run(repaired, work), whole)  # another format's file is not taken
    (work / "model.layers.1.json").write_text("{")
    repaired = Recorder()
    assert_same(run(repaired, work), whole)
    assert len(repaired.calls) == 4
    assert not list(work.glob(".*"))


def assert_same(found: dict[str, dict[str, Array]], whole: dict[str, dict[str, Array]]) -> None:
    """The same parts, bit for bit."""
    assert found.keys() == whole.keys() and len(whole) == 8
    for name, parts in whole.items():
        assert list(found[name]) == list(parts)
        for suffix, part in parts.items():
            assert found[name][suffix].dtype == part.dtype
            assert found[name][suffix].tobytes() == part.tobytes()


def test_sources_of_different_formats(
    checkpoint: Callable[..., Path], some_ids: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Each source of a fused weight for itself; one that stays floating is not given."""
    folder, windows = checkpoint("llama"), windows_of(some_ids)
    rules = (("*.v_proj.weight", "8/32"), ("*.0.*.q_proj.weight", "float"))
    specs = specs_of(folder, rules=rules)
    recorder = Recorder()
    given = quantize_layers(folder, specs, recorder.method, windows, tmp_path, device="cpu")
    for spec in specs:
        parts = given(spec)
        if spec.role != "linear" or spec.format.is_float:
            assert parts is None
            continue
        assert parts is not None
        assert [part.suffix for part in spec.format.stored(*spec.shape)] == list(parts)
    shapes = [weights.shape for weights, _ in recorder.calls]
    assert shapes[:2] == [(32, 64), (32, 64)]  # k and v of layer 0; q stays


def test_nan_activations_name_the_weight(
    checkpoint: Callable[..., Path], some_ids: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Inputs that overflow are the user's bad checkpoint, told in one line."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "huge"
    shutil.copytree(checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:] = 1e38
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QccError, match=r"layers\.1\.self_attn\.q_proj: its inputs are NaN or"):
        quantize_layers(
            folder,
            specs_of(folder),
            Recorder().method,
            windows_of(some_ids),
            tmp_path / "work",
            device="cpu",
        )


def test_a_transform_is_inverted() -> None:
    """Any permutation of elements: sources -> weight -> sources."""

    def shuffle(x: Any) -> Any:
        return x.reshape(3, 2, 2, 5).swapaxes(0, 1).reshape(12, 5)

    sources = (SourceTensor("a.weight", (4, 5)), SourceTensor("b.weight", (8, 5)))
    spec = WeightSpec("ab.weight", (12, 5), float_format("float32"), sources, shuffle)
    numbers = np.random.default_rng(0).standard_normal((12, 5), np.float32)
    held = {"a.weight": numbers[:4], "b.weight": numbers[4:]}
    whole = matrix_of(spec, held.__getitem__)
    assert not (whole == numbers).all()
    for name, part in sources_from(spec, whole).items():
        np.testing.assert_array_equal(part, held[name])
