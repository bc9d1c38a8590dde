"""Every scheme: packed words to the bit, logits against transformers on the dequantized weights.

The contract's schemes one by one; of the others what is stored, and all their formats in a library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes.scheme import list_schemes

SCHEMES = list_schemes()
CONTRACT = (
    *("q0f32", "q0f16", "q0bf16", "q3f16_0", "q3f16_1", "q4f16_0", "q4f16_1", "q4f16_2"),
    *("q4f32_1", "q4bf16_0", "q4bf16_1", "q5f16_1", "q6f16_1", "q8f16_1", "q8f32_1"),
)
Spec = tuple[int, int | str, str, int | None]  # bits, group, grid, bits of two-level scales


def two_level(bits: int, group: int) -> Spec:
    return bits, group, "asymmetric", 6 if bits > 3 else 4


def affine(bits: int, group: int) -> Spec:
    return bits, group, "asymmetric", None


def plain(bits: int, group: int | str) -> Spec:
    return bits, group, "symmetric", None


# Scheme -> linear weights, embedding, lm_head, and the weights that have a format of their own.
OTHERS: dict[str, tuple[Spec, Spec, Spec, dict[str, Spec]]] = {
    "q2f16_k": (two_level(2, 16), two_level(4, 32), two_level(6, 32), {}),
    "q2f16_km": (
        *(two_level(2, 16), two_level(4, 32), two_level(6, 32)),
        {"v_proj": two_level(3, 16), "down_proj": two_level(3, 16)},
    ),
    "q3f16_a32": (affine(3, 32), plain(6, 32), plain(6, 32), {}),
    "q3f16_k": (two_level(3, 16), two_level(4, 32), two_level(6, 32), {}),
    "q3f16_km": (
        *(two_level(3, 16), two_level(4, 32), two_level(6, 32)),
        dict.fromkeys(("v_proj", "o_proj", "down_proj"), two_level(4, 32)),
    ),
    "q4f16_a32": (affine(4, 32), plain(6, 32), plain(6, 32), {}),
    "q4f16_a64": (affine(4, 64), plain(8, 64), affine(4, 64), {}),
    "q4f16_a128": (affine(4, 128), plain(8, 128), plain(8, 128), {}),
    "q4f16_k": (two_level(4, 32), two_level(6, 32), two_level(6, 32), {}),
    "q4f16_km": (
        *(two_level(4, 32), two_level(6, 32), two_level(6, 32)),
        {"v_proj": two_level(5, 32), "down_proj": two_level(5, 32)},
    ),
    "q8f16_c": (plain(8, "row"), plain(8, "row"), plain(8, "row"), {}),
    "q8f16_c_a8": (plain(8, "row"), plain(8, "row"), plain(8, "row"), {}),
}


def test_every_scheme_is_in_a_table(contract: Any) -> None:
    assert set(CONTRACT) == set(contract.formats)
    assert sorted([*CONTRACT, *OTHERS]) == SCHEMES


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


@pytest.mark.parametrize("scheme", [name for name in CONTRACT if name[1] not in "56"])
def test_logits_with_in_dimension_172(check: Any, checkpoint: Any, scheme: str) -> None:
    check(checkpoint("llama"), scheme)


# All formats of linear weights that no scheme of the contract has, a weight each, in one library.
MIXED = """
dtype: float16
linear: 4/32k
rules:
  "*.0.self_attn.q_proj.weight": 2/16k
  "*.0.self_attn.k_proj.weight": 3/32a
  "*.0.self_attn.v_proj.weight": 3/16k
  "*.0.self_attn.o_proj.weight": 4/64a
  "*.0.mlp.gate_proj.weight": 5/32
  "*.0.mlp.up_proj.weight": 8/row
  "*.0.mlp.down_proj.weight": 4/128a
  "*.1.self_attn.q_proj.weight": 6/32
  "*.1.self_attn.o_proj.weight": 5/32k
  "*.1.mlp.gate_proj.weight": {bits: 3, group: 16, scale_bits: 5, layout: KN}
  "*.1.mlp.up_proj.weight": {bits: 4, group: 32, grid: zero_point, dtype: float32}
  "*.1.mlp.down_proj.weight": 4/32a
embedding: 6/32k
lm_head: 4/64a
method: mse
"""


def test_logits_of_all_other_formats(
    check: Any, checkpoint: Any, compiled: Any, contract: Any, tmp_path_factory: Any
) -> None:
    """In-dimensions 64 and 172, an untied head; biases stay floating."""
    path = tmp_path_factory.mktemp("scheme") / "mixed.yaml"
    path.write_text(MIXED, encoding="utf-8")
    folder = checkpoint("llama", tie_word_embeddings=False, attention_bias=True)
    check(folder, str(path))
    formats = contract.formats_in(compiled(folder, str(path)).artifact.folder).values()
    assert len({str(sorted(fields.items())) for fields in formats}) == 14
    linear = {spec for first, _, _, rules in OTHERS.values() for spec in (first, *rules.values())}
    assert linear <= {spec_of(fields) for fields in formats}


def spec_of(fields: dict[str, Any]) -> Spec:
    return (
        *(fields["bits"], fields["group"], fields.get("grid", "symmetric")),
        fields.get("scale_bits"),
    )


# Relative error of random normal weights, about 6 dB a bit.
MOST_ERROR = {2: 0.45, 3: 0.22, 4: 0.11, 5: 0.055, 6: 0.03, 8: 0.01}


@pytest.mark.parametrize("scheme", OTHERS)
def test_stored_weights_of_other_schemes(
    scheme: str, contract: Any, checkpoint: Any, hugging_face: Any, tmp_path: Path
) -> None:
    """Each weight in the format that its scheme is described by, and near what it was."""
    from qcc.compiler.driver import convert_model
    from qcc.compiler.options import CompileOptions

    folder = checkpoint("llama", tie_word_embeddings=False)
    out = convert_model(str(folder), tmp_path / "out", CompileOptions(quant=scheme))
    linear, embedding, head, rules = OTHERS[scheme]
    expected: dict[str, Spec] = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for layer in ("model.layers.0", "model.layers.1"):
        names = ["self_attn.qkv_proj"]
        if "v_proj" in rules:
            names = [f"self_attn.{part}_proj" for part in "qkv"]
        for name in (*names, "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            expected[f"{layer}.{name}.weight"] = rules.get(name.split(".")[1], linear)
    written = contract.formats_in(out)
    assert {name: spec_of(fields) for name, fields in written.items()} == expected
    assert {fields["dtype"] for fields in written.values()} == {"float16"}
    originals = contract.float_weights(hugging_face(folder), list(expected))
    widths = {name: array.shape[1] for name, array in originals.items()}
    read = contract.dequantized(out, None, widths)
    for name, spec in expected.items():
        w = originals[name]
        error = np.linalg.norm(w - read[name]) / np.linalg.norm(w)
        assert MOST_ERROR[spec[0]] / 4 < error < MOST_ERROR[spec[0]], (name, error)


def test_logits_with_in_dimension_352(check: Any, shared: Path) -> None:
    """test_low_precision.py has the same model with q4f16_1."""
    check(shared / "models" / "babyllama-tok361", "q3f16_1")


def test_bundled_model(check: Any, bundled: Path) -> None:
    check(bundled, "q4f16_1")


def test_untied_llama_with_biases(check: Any, checkpoint: Any) -> None:
    """An lm_head apart from the embedding, both of 361 rows, biases stored in f16."""
    folder = checkpoint(
        "llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
        num_attention_heads=7, num_key_value_heads=1, head_dim=20, hidden_size=84,
    )  # fmt: skip
    check(folder, "q3f16_0")


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


@pytest.mark.parametrize("scheme", CONTRACT)
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
