"""Every scheme: packed words to the bit, logits against transformers on the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes.scheme import list_schemes

SCHEMES = list_schemes()


def test_every_scheme_has_a_row_in_the_contract(contract: Any) -> None:
    assert set(SCHEMES) == set(contract.formats)


@pytest.fixture
def check(
    compiled: Any, on_our_weights: Any, hugging_face: Any, logits_of: Any, some_ids: Any,
    tolerance: float,
) -> Callable[..., None]:  # fmt: skip
    """Compare a quantized library with transformers on our weights, and see that these differ."""

    def compare(folder: Path, scheme: str, count: int = 120) -> None:
        llm = compiled(folder, scheme)
        model = on_our_weights(llm.artifact.folder, folder, scheme)
        ids = some_ids(count, model.config.vocab_size)
        expected = logits_of(model, ids)
        np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=tolerance)
        if scheme != "q0f32":
            # Else the comparison would pass with the weights of the checkpoint.
            assert np.abs(expected - logits_of(hugging_face(folder), ids)).max() > 5 * tolerance

    return compare


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_with_in_dimension_172(check: Any, checkpoint: Any, scheme: str) -> None:
    check(checkpoint("llama"), scheme)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q3f16_1"])
def test_logits_with_in_dimension_352(check: Any, shared: Path, scheme: str) -> None:
    check(shared / "models" / "babyllama-tok361", scheme)


def test_bundled_model(check: Any, bundled: Path) -> None:
    check(bundled, "q4f16_1")


def test_untied_llama_with_biases(check: Any, checkpoint: Any) -> None:
    """An lm_head apart from the embedding, both of 361 rows, biases stored in f16."""
    folder = checkpoint(
        "llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
        num_attention_heads=7, num_key_value_heads=1, head_dim=20, hidden_size=84,
    )  # fmt: skip
    check(folder, "q3f16_0")


def test_qwen2(check: Any, checkpoint: Any) -> None:
    check(checkpoint("qwen2", hidden_size=112, num_attention_heads=14), "q4bf16_1")


def test_mistral(check: Any, checkpoint: Any) -> None:
    check(checkpoint("mistral"), "q8f16_1", count=24)


def test_gpt_neox(check: Any, checkpoint: Any) -> None:
    """The transform that sorts query_key_value, on quantized rows."""
    check(checkpoint("gpt_neox", use_parallel_residual=True, rotary_pct=0.25), "q4f16_1")


@pytest.fixture(scope="module")
def hard_checkpoint(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In-dimension 172, with groups of zeros, outliers, ties, and numbers that f16 rounds to 0."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("hard") / "checkpoint"
    shutil.copytree(checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    down = tensors["model.layers.0.mlp.down_proj.weight"]  # [64, 172]
    down[0] = 0
    down[1, :40] = 0
    down[2, 3] = 60000.0
    down[3] *= 1e-7
    down[4] = np.arange(172) % 15 - 7.0  # scale 1: exact codes
    down[5] = (np.arange(172) % 29 - 14) / 2.0  # halves: ties where the scale is 1
    down[6] = -(2.0**-24)  # the smallest f16
    down[7, 160:] = 5.0  # the tail
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["hard", "babyllama-tok361"])
def test_stored_words_and_scales_to_the_bit(
    contract: Any, hugging_face: Any, hard_checkpoint: Path, request: Any, tmp_path: Path,
    name: str, scheme: str,
) -> None:  # fmt: skip
    from qcc.compiler.driver import convert_model
    from qcc.compiler.options import CompileOptions

    if name == "hard":
        folder = hard_checkpoint
    else:
        folder = request.getfixturevalue("shared") / "models" / name
    fmt = contract.formats[scheme]
    stored = contract.read_tensors(
        convert_model(str(folder), tmp_path / "out", CompileOptions(quant=scheme))
    )
    names = {n.replace("q_weight", "weight") for n in stored if not n.endswith("q_scale")}
    weights = contract.float_weights(hugging_face(folder), sorted(names))
    seen = set()
    for weight, source in weights.items():
        quantize = fmt.bits is not None and source.ndim == 2
        if not quantize or (contract.is_table(weight) and not fmt.tables):
            np.testing.assert_array_equal(
                stored[weight], contract.round_to(source.astype(np.float64), fmt.dtype), weight
            )
            seen.add(weight)
            continue
        prefix = weight.removesuffix("weight")
        words, scale = contract.pack(source, fmt)
        if contract.stored_transposed(weight, fmt):
            words, scale = words.T, scale.T
        np.testing.assert_array_equal(stored[prefix + "q_weight"], words, prefix)
        np.testing.assert_array_equal(stored[prefix + "q_scale"], scale, prefix)
        seen |= {prefix + "q_weight", prefix + "q_scale"}
    assert seen == set(stored), "the artifact holds other tensors too"
