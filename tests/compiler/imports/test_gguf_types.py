"""Blocks of ggml's types: codes, grids and stored words against the gguf package, to the bit."""

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qcc.compiler.imports.gguf_types import BLOCK_TYPES, quantized
from qcc.quant_schemes.packing import dequantize, dequantize_codes, store

N, K = 48, 768


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_bit_pattern_dequantizes_as_ggml_has_it(kind: str) -> None:
    """Random bytes: all codes, all scales, every finite f16, subnormal ones too."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (N, K // block * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, GGMLQuantizationType[kind])
        fmt = BLOCK_TYPES[kind].format
        found = quantized(BLOCK_TYPES[kind], data, N, K)
        direct = dequantize_codes(found, fmt)
        stored = dequantize(store(found, fmt), fmt, N, K)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.8
    assert found.codes.min() == 0
    assert found.codes.max() == (2 if kind == "TQ1_0" else 2**fmt.bits - 1)
    assert (direct[finite] == expected[finite]).all()
    assert (stored[finite] == expected[finite]).all()
    assert not np.isfinite(stored[~finite]).any()
    if kind != "TQ1_0":  # whose digits of base 3 take 1.6 bits
        assert fmt.bits_per_weight() == 8 * size / block


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_what_ggml_quantized_comes_back(kind: str) -> None:
    """The package's own quantizer, whose error shows that the right weights are meant."""
    weights = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)
    data = gguf.quantize(weights, GGMLQuantizationType[kind])
    fmt = BLOCK_TYPES[kind].format
    found = dequantize_codes(quantized(BLOCK_TYPES[kind], data, N, K), fmt)
    assert (found == gguf.dequantize(data, GGMLQuantizationType[kind])).all()
    assert np.corrcoef(found.ravel(), weights.ravel())[0, 1] > (0.6 if fmt.bits == 2 else 0.99)
