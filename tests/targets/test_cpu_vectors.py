"""The CPU kernels' exp, exp2, log2, tanh, cos, sin and rope table against numpy float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.tirx.script import builder as T

from qcc.targets.attention import kernel, tensor
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.rope import rope_table
from qcc.targets.spec import KVCacheConfig

HOST = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}


@functools.cache
def vector_function(name: str, dtype: str, lanes: int) -> Any:
    """out[i] = function(x[i]) over an array."""
    emit = {
        "exp": vx.exp,
        "exp2": vx.exp2,
        "log2": vx.log2,
        "tanh": vx.tanh,
        "cos": lambda x, n: vx.cos_sin(x, n)[0],
        "sin": lambda x, n: vx.cos_sin(x, n)[1],
    }[name]
    with kernel(name) as build:
        n = T.int64()
        x, out = tensor("x", (n,), dtype), tensor("out", (n,), "float32")
        with build.body():
            with T.serial(0, n // lanes) as i:
                value = vx.keep(vx.load(x, i * lanes, lanes), lanes, dtype)
                vx.store(out, i * lanes, emit(value, lanes), lanes)
    func = build.result().with_attr("global_symbol", name)
    return tvm.tirx.build(tvm.IRModule({name: func}), target=tvm.target.Target(HOST))[name]


def run_vector(name: str, x: np.ndarray, lanes: int) -> np.ndarray:
    out = tvm.runtime.tensor(np.empty(x.shape, "float32"))
    vector_function(name, str(x.dtype), lanes)(tvm.runtime.tensor(x), out)
    return out.numpy().astype(np.float64)


@pytest.mark.parametrize("lanes", [1, 16])
def test_vector_exp2(lanes: int) -> None:
    x = np.concatenate([np.linspace(-126, 0, 1 << 17), -np.logspace(-30, 0, 1 << 10)])
    x = x.astype("float32")
    error = run_vector("exp2", x, lanes) / np.exp2(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 2e-7
    far = np.array([-126.01, -200, -1e30, -3e38] * 4, "float32")
    assert not run_vector("exp2", far, lanes).any()


@pytest.mark.parametrize("lanes", [1, 16])
def test_vector_exp(lanes: int) -> None:
    """As near where x log2 e is large: the fraction has what the product's rounding lost."""
    x = np.concatenate([np.linspace(-87.3, 0, 1 << 17), -np.logspace(-30, 0, 1 << 10)])
    x = x.astype("float32")
    error = run_vector("exp", x, lanes) / np.exp(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 1.5e-7
    far = np.array([-87.5, -200, -1e30, -3e38] * 4, "float32")
    assert not run_vector("exp", far, lanes).any()


def test_vector_log2() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp(rng.uniform(-80, 80, 1 << 16)), np.linspace(0.5, 2, 1 << 16)])
    x = x.astype("float32")
    exact = np.log2(x.astype(np.float64))
    assert (np.abs(run_vector("log2", x, 16) - exact) / np.maximum(np.abs(exact), 1)).max() < 1.5e-7


@pytest.mark.parametrize("lanes", [1, 16])
def test_vector_tanh(lanes: int) -> None:
    """Relative error, from where x is denormal almost to where tanh is 1, and on both sides."""
    x = np.concatenate([np.logspace(-36, 1.2, 1 << 16), np.linspace(1e-3, 20, 1 << 16)])
    x = np.concatenate([x, -x, [0, 1e30, -1e30, 3e38] * 4]).astype("float32")
    exact = np.tanh(x.astype(np.float64))
    error = run_vector("tanh", x, lanes) - exact
    assert (np.abs(error) <= 3e-7 * np.abs(exact)).all()


def test_vector_cos_sin() -> None:
    turns = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16).astype("uint32")
    angle = turns * (2 * np.pi / 2**32)
    assert np.abs(run_vector("cos", turns, 16) - np.cos(angle)).max() < 1.5e-7
    assert np.abs(run_vector("sin", turns, 16) - np.sin(angle)).max() < 1.5e-7


def test_rope_table_at_large_positions() -> None:
    """f32 angles as Hugging Face computes them: only the last bits of cos and sin may differ."""
    inv_freq = (np.float32(1) / np.float32(10000.0) ** (np.arange(0, 64, 2) / 64)).astype("float32")
    positions = 100_000
    c = KVCacheConfig(
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        rotary_dim=64,
        inv_freq=tuple(inv_freq.tolist()),
        rope_attention_factor=1.5,
        max_positions=positions,
        sliding_window_size=-1,
        attention_sink_size=0,
        prefill_chunk_size=1,
        dtype="float32",
    )
    func = rope_table(c, 16).with_attr("global_symbol", "rope_table")
    mod = tvm.tirx.build(tvm.IRModule({"rope_table": func}), target=tvm.target.Target(HOST))
    table = tvm.runtime.tensor(np.empty((positions, 64), "float32"))
    mod["rope_table"](tvm.runtime.tensor(inv_freq), table)
    angle = (np.arange(positions, dtype="float32")[:, None] * inv_freq).astype("float64")
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * 1.5
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=3e-7)
