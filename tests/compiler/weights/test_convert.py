"""convert_weights: what is stored for fused, transformed, cast weights; errors; interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qcc.compiler.weights import convert
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.convert import convert_weights
from qcc.compiler.weights.spec import SourceTensor, WeightSpec
from qcc.quant_schemes import packing
from qcc.quant_schemes.rounding import rtn
from qcc.quant_schemes.scheme import WeightFormat, load_scheme
from qcc.runtime.artifact import Artifact, write_manifest
from qcc.runtime.errors import QccError

SHARED = Path(__file__).resolve().parents[4] / "shared"
Q4 = WeightFormat(4, "float16", 32)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))


def normal(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> Any:
    return RNG.standard_normal(shape).astype(dtype)


def swap_halves(w: Any) -> Any:
    """A permutation of rows, as a rotary layout asks for."""
    return np.concatenate([w[len(w) // 2 :], w[: len(w) // 2]])


TENSORS: dict[str, Any] = {
    "embed.weight": normal(50, 72),
    "q.weight": normal(24, 72),
    "k.weight": normal(8, 72, dtype=np.float32),
    "v.weight": normal(8, 72, dtype=np.float16),
    "o.weight": normal(72, 100, dtype=np.float32),
    "q.bias": normal(24),
    "k.bias": normal(8),
    "norm.weight": normal(72),
    "rotary.inv_freq": np.arange(4, dtype=np.int64),
}
IGNORED = ("*.inv_freq",)


def spec(
    name: str, fmt: WeightFormat, *sources: str, transform: Callable[[Any], Any] | None = None
) -> WeightSpec:
    shapes = [TENSORS[source].shape for source in sources]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    parts = tuple(SourceTensor(n, s) for n, s in zip(sources, shapes, strict=True))
    return WeightSpec(name, shape, fmt, parts, transform)


def specs_of(fmt: WeightFormat, floating: WeightFormat) -> list[WeightSpec]:
    return [
        spec("embed.weight", replace(fmt, layout="NK"), "embed.weight"),
        spec("qkv.weight", fmt, "q.weight", "k.weight", "v.weight", transform=swap_halves),
        spec("qkv.bias", floating, "q.bias", "k.bias"),
        spec("o.weight", fmt, "o.weight"),
        spec("norm.weight", floating, "norm.weight"),
    ]


@contextmanager
def opened(folder: Path, tensors: dict[str, Any] | None = None) -> Iterator[Checkpoint]:
    folder.mkdir(exist_ok=True)
    save_file(tensors or TENSORS, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint


def make_openable(folder: Path, scheme: str = "mine") -> None:
    """The files of an artifact that the converter does not write."""
    (folder / "mlc-chat-config.json").write_text("{}")
    fields = {"source": {}, "scheme": scheme, "method": "rtn", "tensors": {}, "sizes": {}}
    write_manifest(folder, {**fields, "libraries": {}})


def source_of(weight: WeightSpec) -> Any:
    parts = [TENSORS[source.name].astype(np.float32) for source in weight.sources]
    whole = np.concatenate(parts)
    return weight.transform(whole) if weight.transform else whole


FLOATING = {
    "float16": WeightFormat(16, "float16"),
    "bfloat16": WeightFormat(16, "bfloat16"),
    "float32": WeightFormat(32, "float32"),
}


@pytest.mark.parametrize("block", [64, 1000, 4 << 20])
@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [(4, 32, "float16"), (3, 40, "float16"), (4, 32, "float32"), (8, 32, "bfloat16")],
)
def test_stored_tensors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group: int,
    dtype: str,
    layout: str,
    block: int,
) -> None:
    monkeypatch.setattr(convert, "BLOCK_BYTES", block)
    specs = specs_of(WeightFormat(bits, dtype, group, layout), FLOATING[dtype])
    seen: list[tuple[int, int, str]] = []
    with opened(tmp_path / "in") as checkpoint:
        out = tmp_path / "out"
        records = convert_weights(
            checkpoint, specs, out, lambda *call: seen.append(call), ignored=IGNORED
        )
    make_openable(out)
    artifact = Artifact.open(out)
    artifact.verify()
    assert [r.name for r in records] == [part.name for s in specs for part in s.stored]
    assert list(artifact.records.values()) == records
    for weight in specs:
        w = source_of(weight)
        got = [artifact.read(part.name) for part in weight.stored]
        for array, part in zip(got, weight.stored, strict=True):
            assert array.shape == part.shape and array.dtype.name == part.dtype
        if weight.format.is_float:
            np.testing.assert_array_equal(got[0], w.astype(packing.float_dtype(dtype)))
            continue
        wanted = packing.store(rtn.quantize(w, weight.format), weight.format)
        np.testing.assert_array_equal(got[0], wanted["q_weight"])
        np.testing.assert_array_equal(got[1], wanted["q_scale"])
    total = sum(TENSORS[s.name].nbytes for weight in specs for s in weight.sources)
    assert seen[-1][:2] == (total, total)
    assert [call[0] for call in seen] == sorted(call[0] for call in seen)
    assert {call[2] for call in seen} == {weight.name for weight in specs}


def test_names_of_stored_tensors() -> None:
    assert [s.name for s in spec("a.weight", Q4, "q.weight").stored] == ["a.q_weight", "a.q_scale"]


def failure(tmp_path: Path, specs: list[WeightSpec], tensors: dict[str, Any] | None = None) -> str:
    """The one-line error of a conversion into an artifact folder, which must stay as it was."""
    out = tmp_path / "out"
    with opened(tmp_path / "good", {"norm.weight": TENSORS["norm.weight"]}) as checkpoint:
        convert_weights(checkpoint, [spec("norm.weight", FLOATING["float32"], "norm.weight")], out)
    make_openable(out, "old")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with opened(tmp_path / "in", tensors) as checkpoint, pytest.raises(QccError) as caught:
        convert_weights(checkpoint, specs, out, ignored=IGNORED)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    Artifact.open(out).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


ALL = specs_of(Q4, FLOATING["float16"])


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = {name: value for name, value in TENSORS.items() if name != "o.weight"}
    assert "the checkpoint has no tensor 'o.weight'" in failure(tmp_path, ALL, tensors)


def test_unused_tensors(tmp_path: Path) -> None:
    text = failure(tmp_path, ALL[:1])
    assert "tensors that this architecture does not use: " in text
    assert "k.bias" in text and "and 2 more" in text and "inv_freq" not in text


def test_a_scale_of_inputs_that_nothing_gives(tmp_path: Path) -> None:
    scaled = replace(spec("o.weight", Q4, "o.weight"), input_scale=True)
    tensors = {"o.weight": TENSORS["o.weight"]}
    parts = packing.store(rtn.METHOD.quantize(tensors["o.weight"], Q4, None), Q4)
    with opened(tmp_path / "in", tensors) as checkpoint:
        for given in (None, lambda _spec: None, lambda _spec: parts):
            with pytest.raises(QccError, match=r"o\.weight: .*activations: static needs the scale"):
                convert_weights(checkpoint, [scaled], tmp_path / "out", given=given)
        parts["q_input_scale"] = np.array([0.25], np.float32)
        records = convert_weights(checkpoint, [scaled], tmp_path / "out", given=given)
    assert [record.name for record in records] == ["o.q_weight", "o.q_scale", "o.q_input_scale"]


def test_a_wrong_shape(tmp_path: Path) -> None:
    text = failure(tmp_path, ALL, {**TENSORS, "o.weight": normal(72, 101, dtype=np.float32)})
    assert "tensor 'o.weight' has shape [72, 101], config.json asks for [72, 100]" in text


def test_a_wrong_dtype(tmp_path: Path) -> None:
    text = failure(tmp_path, ALL, {**TENSORS, "q.bias": np.zeros(24)})
    assert "tensor 'q.bias' has dtype F64, allowed" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["o.weight", "embed.weight", "v.weight", "norm.weight"])
def test_not_finite(tmp_path: Path, name: str, bad: float) -> None:
    tensors = {**TENSORS, name: TENSORS[name].copy()}
    tensors[name].reshape(-1)[-1] = bad
    for dtype in ("float16", "bfloat16", "float32"):
        specs = specs_of(WeightFormat(4, dtype, 32), FLOATING[dtype])
        text = failure(tmp_path, specs, tensors)
        assert "holds NaN or infinite numbers; it is damaged" in text
        assert f"'{name}'" in text or "q.weight, k.weight, v.weight" in text


def test_a_nan_of_all_ones(tmp_path: Path) -> None:
    """Its bits are the largest of all: integer rounding must not lose it."""
    tensors = {**TENSORS, "o.weight": TENSORS["o.weight"].copy()}
    tensors["o.weight"].view(np.uint32)[3, 3] = 0x7FFFFFFF
    specs = specs_of(WeightFormat(4, "bfloat16", 32), FLOATING["bfloat16"])
    assert "tensor 'o.weight' of the checkpoint holds NaN" in failure(tmp_path, specs, tensors)
    specs[3] = replace(specs[3], format=FLOATING["bfloat16"])
    assert "tensor 'o.weight' of the checkpoint holds NaN" in failure(tmp_path, specs, tensors)


@pytest.mark.parametrize("name", ["o.weight", "norm.weight"])
def test_beyond_the_range_of_f16(tmp_path: Path, name: str) -> None:
    tensors = {**TENSORS, name: TENSORS[name].copy()}
    tensors[name].reshape(-1)[7] = -70000
    text = failure(tmp_path, ALL, tensors)
    assert f"tensor '{name}': 7" in text and "is beyond the range of float16 (65504)" in text


def test_a_conversion_replaces_an_older_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(tmp_path / "in") as checkpoint:
        convert_weights(checkpoint, ALL, out, ignored=IGNORED)
        make_openable(out)
        convert_weights(checkpoint, ALL, out, ignored=IGNORED)
    with pytest.raises(QccError, match="not a qcc artifact"):  # until the driver writes qcc.json
        Artifact.open(out)
    make_openable(out)
    Artifact.open(out).verify()


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from qcc.compiler.weights import convert
import test_convert as t
convert.BLOCK_BYTES = 64

def stall(done, total, name):
    if name == "qkv.weight":
        print("writing", flush=True)
        time.sleep(60)

with t.Checkpoint.open(sys.argv[2]) as checkpoint:
    t.convert_weights(checkpoint, t.ALL, Path(sys.argv[3]), stall, ignored=t.IGNORED)
"""


def test_kill_9_leaves_nothing_that_opens(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(tmp_path / "in"):
        pass
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent)]
    with subprocess.Popen(
        [*command, str(tmp_path / "in"), str(out)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        os.kill(child.pid, signal.SIGKILL)
    left = [path.name for path in out.iterdir()]
    assert left and all(".tmp-" in name for name in left)
    with pytest.raises(QccError, match=r"not a qcc artifact \(or an interrupted compile\)"):
        Artifact.open(out)
    with opened(tmp_path / "in") as checkpoint:
        convert_weights(checkpoint, ALL, out, ignored=IGNORED)
    assert sorted(path.name for path in out.iterdir()) == [
        "params_shard_0.bin",
        "tensor-cache.json",
    ]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with opened(tmp_path / "in") as checkpoint, pytest.raises(KeyboardInterrupt):
        convert_weights(checkpoint, ALL, tmp_path / "out", interrupt, ignored=IGNORED)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("model", ["stories260K", "babyllama-tok361"])
def test_a_shared_model(tmp_path: Path, model: str) -> None:
    folder = SHARED / "models" / model
    if not folder.is_dir():
        pytest.skip(f"shared/models/{model} is not here")
    scheme = load_scheme("q4f16_1")
    with Checkpoint.open(folder) as checkpoint:
        specs = []
        for name in checkpoint.names:
            shape = checkpoint.shape(name)
            fmt = scheme.format_of(name, role="linear", ndim=len(shape))
            specs.append(WeightSpec(name, shape, fmt, (SourceTensor(name, shape),)))
        convert_weights(checkpoint, specs, tmp_path / "out")
        make_openable(tmp_path / "out")
        artifact = Artifact.open(tmp_path / "out")
        for weight in specs:
            w = checkpoint.read(weight.name).astype(np.float32)
            got = [artifact.read(part.name) for part in weight.stored]
            if weight.format.is_float:
                np.testing.assert_array_equal(got[0], w.astype(np.float16))
                continue
            parts = {"q_weight": got[0], "q_scale": got[1]}
            back = packing.dequantize(parts, weight.format, *weight.shape)
            # Half a step, and what f16 loses in the steps of the formula.
            step = np.repeat(got[1].astype(np.float32), 32, axis=1)[:, : w.shape[1]]
            assert (np.abs(back - w) <= step * (0.5 + 28 * 2**-10)).all()
