"""What the KV cache does around attention on a GPU: rope, pages, the merge of two parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ..attention_session import rotate
from ..wgsl import garbage
from .attention_cases import compiled, gpu_config

CASES: dict[str, dict[str, Any]] = {
    "d64-f16": {"heads": (4, 2), "dim": 64, "dtype": "float16"},
    "d20-pairs-f32": {"heads": (3, 1), "dim": 20, "rotary": 12},
    "d36-lse-f16": {
        "heads": (6, 2),
        "dim": 36,
        "rotary": 16,
        "returns_lse": True,
        "rope_attention_factor": 1.25,
        "dtype": "float16",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_rope_on_a_gpu(name: str) -> None:
    """The table to 2e-7, and q, k, v split and rotated by it, as rounded as they are stored."""
    c = gpu_config(**CASES[name], max_positions=100_000)
    inv_freq = np.array(c.inv_freq, "float32")
    shape = (c.max_positions, c.rotary_dim)
    (table,) = compiled(c, "rope_table")([inv_freq, garbage(shape, "float32")])
    angle = (np.arange(c.max_positions, dtype="float32")[:, None] * inv_freq).astype("float64")
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * c.rope_attention_factor
    np.testing.assert_allclose(table, expected, rtol=0, atol=2e-7)

    hq, hkv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    qkv = np.random.default_rng(0).standard_normal((5, hq + 2 * hkv, d)).astype(c.dtype)
    positions = np.array([3, 0, 511, 17, 99_999], "int32")
    outputs = [garbage((5, heads, d), c.dtype) for heads in (hq, hkv, hkv)]
    q, k, v = compiled(c, "split_rotary")([qkv, positions, *outputs, table], [2, 3, 4])
    # The reference's angles are not rounded to f32: at position 99,999 by up to 2^-8.
    near = positions < 512
    turned = rotate(c, qkv[near].astype("float64"), positions[near])
    tolerance = 1e-3 if c.dtype == "float16" else 1e-4
    rows = np.concatenate([q, k], axis=1).astype("float64")
    np.testing.assert_allclose(rows[near], turned[:, : hq + hkv], rtol=tolerance, atol=tolerance)
    half = c.rotary_dim // 2
    cos, sin = (part.astype("float64") for part in np.split(table[99_999], 2))
    a, b = (qkv[4, : hq + hkv, i * half : (i + 1) * half].astype("float64") for i in range(2))
    far = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    np.testing.assert_allclose(rows[4, :, : 2 * half], far, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(v, qkv[:, hq + hkv :])


def test_split_without_rope_on_a_gpu() -> None:
    c = gpu_config("float16", sliding_window_size=40)
    qkv = np.random.default_rng(0).standard_normal((3, 8, 16)).astype(c.dtype)
    outputs = [garbage((3, heads, 16), c.dtype) for heads in (4, 2, 2)]
    found = compiled(c, "split_rotary")([qkv, np.zeros(3, "int32"), *outputs, 0], [2, 3, 4])
    np.testing.assert_array_equal(np.concatenate(found, axis=1), qkv)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_pages_of_a_gpu(name: str) -> None:
    """Tokens put into slots, moved and copied, are those that are read there."""
    c = gpu_config(**CASES[name])
    hkv, d = c.num_key_value_heads, c.head_dim
    k, v = np.random.default_rng(0).standard_normal((2, 5, hkv, d)).astype(c.dtype)
    slots = np.array([17, -1, 63, 16, 2], "int32")
    before = garbage((4, 2, hkv, 16, d), c.dtype)
    (pages,) = compiled(c, "transpose_append")([before, k, v, slots], [0])

    def read(pages: np.ndarray, *slots: int, layer: int = 1) -> list[np.ndarray]:
        outputs = [garbage((2, len(slots), hkv, d), c.dtype) for _ in range(2)]
        args = [pages, np.array(slots, "int32"), *outputs, layer]
        found = compiled(c, "debug_get_kv")(args, [2, 3])
        assert np.isnan([each[1 - layer] for each in found]).all()
        return [each[layer] for each in found]

    def same(found: list[np.ndarray], tokens: list[int]) -> None:
        np.testing.assert_array_equal(found, [k[tokens], v[tokens]])

    same(read(pages, 17, 63, 16, 2), [0, 2, 3, 4])
    untouched = [i for i in range(64) if i not in slots]
    assert np.isnan(read(pages, *untouched, layer=0)).all()

    # In this order: slot 16 is read before it is written.
    moves = np.array([[63, 16, 2], [5, 63, 16]], "int32")
    args = [pages, np.array([0, 2, 3], "int32"), moves, 2]
    (moved,) = compiled(c, "compact_copy")(args, [0])
    same(read(moved, 5, 63, 16, 17), [2, 3, 4, 0])

    (copied,) = compiled(c, "copy_single_page")([pages, 1, 2, 3], [0])
    same(read(copied, 33, 32, 17), [0, 3, 0])
    np.testing.assert_array_equal(copied[[0, 1, 3]], pages[[0, 1, 3]])


@pytest.mark.parametrize("name", CASES)
def test_merge_of_two_parts_on_a_gpu(name: str) -> None:
    c = gpu_config(**CASES[name])
    rng = np.random.default_rng(0)
    hq, hkv, d, n = c.num_attention_heads, c.num_key_value_heads, c.head_dim, 37
    v, v_other = rng.standard_normal((2, n, hq, d)).astype(c.dtype)
    s, s_other = (rng.standard_normal((2, n, hq)) * 5).astype("float32")
    s[2], s_other[3] = -1e30, -1e30  # rows without keys
    out, lse = compiled(c, "merge_state")([v, s, v_other, s_other], [0, 1])
    top = np.maximum(s, s_other).astype("float64")
    a, b = np.exp2(s - top), np.exp2(s_other - top)
    expected = (v * (a / (a + b))[..., None] + v_other * (b / (a + b))[..., None]).reshape(
        n, hkv, -1, d
    )
    lses = (top + np.log2(a + b)).reshape(n, hkv, -1)
    if c.returns_lse:
        expected[:, :, -1] = 0
        expected[:, :, -1, : c.group] = lses[:, :, :-1] * np.log(2)
    tolerance = 1e-3 if c.dtype == "float16" else 1e-6
    np.testing.assert_allclose(
        out.reshape(expected.shape).astype("float64"), expected, rtol=tolerance, atol=tolerance
    )
    lse = lse.reshape(lses.shape)[:, :, : c.group]
    np.testing.assert_allclose(lse, lses[:, :, : c.group], rtol=1e-6, atol=1e-6)
