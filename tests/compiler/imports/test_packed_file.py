"""GPTQ and AutoAWQ weights: the formula in f64, written from the other side, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import dequantize, store
from qcc.runtime.errors import QccError

N, K, GROUP = 24, 96, 32


def words_down(codes: Any, bits: int) -> Any:
    """GPTQ's words: each column's codes as one long binary number, cut in pieces of 32 bits."""
    k, n = codes.shape
    words = np.zeros((-(-k * bits // 32), n), np.uint32)
    for column in range(n):
        number = sum(int(code) << (i * bits) for i, code in enumerate(codes[:, column]))
        for row in range(len(words)):
            words[row, column] = number >> (32 * row) & 0xFFFFFFFF
    return words.view(np.int32)


def words_awq(codes: Any) -> Any:
    """AutoAWQ's words: nibble i of a word is the code that its order map names."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, which in enumerate(order):
        words |= codes[:, which::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


Made = Callable[..., tuple[Path, Any, Any]]


@pytest.fixture
def packed(tmp_path: Path) -> Made:
    """packed(method, bits, ...): a folder with one layer, its codes [k, n] and its weights [n, k].

    `zero`: of all groups; None: drawn. `groups`: the group of each of the k inputs.
    """

    def make(
        method: str = "gptq",
        bits: int = 4,
        *,
        group: int = GROUP,
        zero: int | None = None,
        groups: Any = None,
        g_idx: bool = False,
        scales: Any = None,
        extra: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> tuple[Path, Any, Any]:
        rng = np.random.default_rng(bits)
        size = K if group == -1 else group
        codes = rng.integers(0, 2**bits, (K, N))
        # The first format stores z - 1, so that no zero point is 0.
        zeros = rng.integers(1, 2**bits, (-(-K // size), N))
        zeros = zeros if zero is None else np.full_like(zeros, zero)
        given = np.arange(K) // size if groups is None else groups
        if scales is None:
            scales = rng.uniform(0.001, 0.02, zeros.shape).astype(np.float16)
        weights = (codes - zeros[given]).astype(np.float64) * scales.astype(np.float64)[given]
        settings = {"quant_method": method, "bits": bits, "group_size": group, **(config or {})}
        offset = 1 if method == "gptq" and settings.get("checkpoint_format") != "gptq_v2" else 0
        tensors = {
            "a.qweight": words_awq(codes) if method == "awq" else words_down(codes, bits),
            "a.qzeros": words_awq(zeros)
            if method == "awq"
            else np.ascontiguousarray(words_down((zeros - offset).T, bits).T),
            "a.scales": scales,
            "b.weight": rng.normal(size=(3, 5)).astype(np.float16),
            **(extra or {}),
        }
        if g_idx or groups is not None:
            tensors["a.g_idx"] = given.astype(np.int32)
        save_file(tensors, tmp_path / "model.safetensors")
        text = json.dumps({"quantization_config": settings})
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        return tmp_path, codes, np.ascontiguousarray(weights.T)

    return make


def check_kept(folder: Path, codes: Any, weights: Any, expected: WeightFormat) -> None:
    """Numbers and codes are those of the reference, and the format is the expected one."""
    with Checkpoint.open(folder) as checkpoint:
        assert sorted(checkpoint.names) == ["a.weight", "b.weight"]
        checkpoint.check("a.weight", (N, K))
        read = checkpoint.read("a.weight")
        assert read.dtype == np.float32
        assert (read == weights).all()
        assert (checkpoint.read_flat("a.weight", 5, 3 * K + 7) == weights.flat[5 : 3 * K + 7]).all()
        assert checkpoint.format("a.weight") == expected
        assert checkpoint.format("b.weight") is None
        found = checkpoint.quantized("a.weight")
        assert (found.codes == codes.T).all()
        assert (dequantize(store(found, expected), expected, N, K) == weights).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_keeps_codes_and_zero_points(packed: Made, bits: int, version: str) -> None:
    """Asymmetric GPTQ of both formats; the g_idx is one of runs."""
    made = packed("gptq", bits, g_idx=True, config={"checkpoint_format": version, "sym": False})
    check_kept(*made, WeightFormat(bits, "float16", GROUP, grid="zero_point"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_one_zero_point_is_symmetric(packed: Made, bits: int) -> None:
    """sym: every zero point is the middle code, and needs no storing."""
    middle = 2 ** (bits - 1)
    made = packed("gptq", bits, zero=middle)
    check_kept(*made, WeightFormat(bits, "float16", GROUP, zero=middle))


def test_gptq_rows(packed: Made) -> None:
    """group_size -1: one scale a row."""
    check_kept(*packed(group=-1), WeightFormat(4, "float16", "row", grid="zero_point"))


def test_gptq_scales_in_f32(packed: Made) -> None:
    """The scales' dtype is the format's."""
    scales = np.random.default_rng(0).integers(1, 2**11, (K // GROUP, N)).astype(np.float32) / 2**18
    check_kept(*packed(scales=scales), WeightFormat(4, "float32", GROUP, grid="zero_point"))


def test_awq_keeps_codes(packed: Made) -> None:
    """AutoAWQ's gemm packing."""
    made = packed("awq", config={"version": "gemm", "zero_point": True})
    check_kept(*made, WeightFormat(4, "float16", GROUP, grid="zero_point"))


def test_activation_order_is_dequantized_exactly(packed: Made) -> None:
    """A g_idx that deals columns to groups: exact numbers, no codes, and a reason."""
    groups = np.random.default_rng(1).permutation(np.arange(K) // GROUP)
    folder, _, weights = packed(groups=groups, config={"desc_act": True})
    with Checkpoint.open(folder) as checkpoint:
        assert (checkpoint.read("a.weight") == weights).all()
        assert checkpoint.format("a.weight") is None
        origin = checkpoint.origin("a.weight")
        assert origin is not None and "g_idx" in origin.why
        assert origin.near == WeightFormat(4, "float16", GROUP, grid="zero_point")


def test_a_zero_point_beyond_the_codes_is_not_wrapped(packed: Made) -> None:
    """Stored 15 is the zero point 16 of the formula, which no code of 4 bits is."""
    folder, _, weights = packed(zero=16)
    with Checkpoint.open(folder) as checkpoint:
        assert (checkpoint.read("a.weight") == weights).all()
        assert checkpoint.format("a.weight") is None


def test_idle_biases_are_not_listed(packed: Made) -> None:
    """GPTQ writes zero biases for layers of models that have none."""
    folder, _, _ = packed(extra={"a.bias": np.zeros(N, np.float16)})
    with Checkpoint.open(folder) as checkpoint:
        assert "a.bias" not in checkpoint.names and not checkpoint.read("a.bias").any()


def test_used_biases_are_listed(packed: Made) -> None:
    """A bias that is one stays."""
    folder, _, _ = packed(extra={"a.bias": np.ones(N, np.float16)})
    with Checkpoint.open(folder) as checkpoint:
        assert "a.bias" in checkpoint.names


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "exl2"}, "quant_method 'exl2' is not supported; supported: gptq, awq"),
        ({"bits": 5}, "bits is 5, gptq has 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 16}, r"'a.qzeros' has shape \[3, 3\], gptq-4bit-16g .* has \[6, 3\]"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({"dynamic": {"a": {"bits": 8}}}, "dynamic .* is not supported"),
        ({"desc_actt": True}, "unknown key 'desc_actt' = True .did you mean 'desc_act'"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ version 'gemv'"),
    ],
)
def test_bad_settings_are_named(packed: Made, config: dict[str, Any], message: str) -> None:
    """Each is one line that says what is wrong."""
    folder, _, _ = packed(config=config)
    with pytest.raises(QccError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a.qzeros": np.zeros((3, 4), np.int32)}, r"'a.qzeros' has shape \[3, 4\]"),
        ({"a.scales": np.zeros((3, N), np.int32)}, "'a.scales' has dtype I32"),
        ({"a.g_idx": np.zeros(K, np.int64)}, "'a.g_idx' has dtype I64, it must be I32"),
        ({"c.qweight": np.zeros((12, N), np.int32)}, "'c.qzeros' is missing"),
    ],
)
def test_bad_tensors_are_named(packed: Made, extra: dict[str, Any], message: str) -> None:
    """Shapes and dtypes are checked when the checkpoint is opened."""
    folder, _, _ = packed(extra=extra)
    with pytest.raises(QccError, match=message):
        Checkpoint.open(folder)


def test_a_group_index_out_of_range_is_refused(packed: Made) -> None:
    """It would read past the scales."""
    folder, _, _ = packed(extra={"a.g_idx": np.full(K, 3, np.int32)})
    with Checkpoint.open(folder) as checkpoint, pytest.raises(QccError, match="names groups 3 to"):
        checkpoint.read("a.weight")


def test_infinite_scales_are_refused(packed: Made) -> None:
    """They would be stored as they are."""
    scales = np.full((K // GROUP, N), np.nan, np.float16)
    folder, _, _ = packed(scales=scales)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(QccError, match="NaN or infinite"):
        checkpoint.quantized("a.weight")


def test_settings_without_packed_tensors(packed: Made) -> None:
    """config.json of a quantized model beside the weights of another."""
    folder, _, _ = packed()
    save_file({"b.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    with pytest.raises(QccError, match=r"no tensor is named \*\.qweight"):
        Checkpoint.open(folder)
