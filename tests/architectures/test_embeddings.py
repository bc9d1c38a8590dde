"""Embedding models: vectors of several texts in one pass against transformers' of each alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..embeddings import BERT, reference_vectors, save_embedding, with_weights
from .cases import LATENT, TINY
from .our_weights import our_weights

# Past every window; the last fills the library's.
LENGTHS = (31, 1, 2, 90, 47, 128)
WINDOW = 128
LAYERS: dict[str, Any] = {**TINY, "max_position_embeddings": 128}


@dataclass(frozen=True)
class EmbeddingCase:
    """A checkpoint: `head` is there where a class with one wrote it, else names have no prefix."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    pooling: str
    normalized: bool = False
    head: bool = False
    marks: tuple[pytest.MarkDecorator, ...] = field(default=())


EMBEDDINGS = [
    EmbeddingCase("bert", "bert", BERT, "cls"),
    EmbeddingCase("bert-masked", "bert", {**BERT, "hidden_act": "gelu_new"}, "mean", True, True),
    # Positions begin behind the padding token; no text holds it.
    EmbeddingCase("roberta", "roberta", {**BERT, "max_position_embeddings": 129}, "mean"),
    EmbeddingCase(
        "xlm-roberta", "xlm-roberta",
        {**BERT, "max_position_embeddings": 131, "pad_token_id": 2, "type_vocab_size": 1}, "cls",
        head=True,
    ),
    EmbeddingCase("qwen3", "qwen3", LAYERS, "last"),
    EmbeddingCase(
        "qwen3-windows", "qwen3",
        {
            **LAYERS, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
        "mean", True,
    ),
    EmbeddingCase("mistral", "mistral", {**LAYERS, "sliding_window": 24}, "last", head=True),
    EmbeddingCase(
        "gemma3_text", "gemma3_text",
        {
            **LAYERS, "sliding_window": 24, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "mean",
    ),
    EmbeddingCase(
        "gpt2", "gpt2",
        {"n_embd": 84, "n_layer": 2, "n_head": 3, "n_positions": 128, "vocab_size": 361}, "last",
    ),
    EmbeddingCase(
        "deepseek_v3", "deepseek_v3",
        {
            **{key: value for key, value in {**LAYERS, **LATENT}.items() if key != "head_dim"},
            "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        },
        "last", head=True,
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(each, id=each.name) for each in EMBEDDINGS])
def case(request: Any) -> EmbeddingCase:
    found: EmbeddingCase = request.param
    return found


@pytest.fixture(scope="module")
def folder(case: EmbeddingCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp(case.name)
    config, pooling = case.config, case.pooling
    return save_embedding(where, case.model_type, config, pooling, case.normalized, head=case.head)


Make = Callable[[Path, str], Any]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Make:
    """embedder(folder, scheme): its Embedder; one pass takes two of the longest texts."""
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.sizes import SizeFlags
    from qcc.runtime import Embedder

    made: dict[tuple[Path, str], Any] = {}
    target = pytestconfig.getoption("--target")

    def make(folder: Path, quant: str) -> Any:
        if (folder, quant) not in made:
            sizes = SizeFlags(context_window=WINDOW, prefill_chunk=2 * WINDOW)
            options = CompileOptions(quant=quant, sizes=sizes, task="embedding", targets=(target,))
            out = compile_model(str(folder), tmp_path_factory.mktemp("artifact") / quant, options)
            made[folder, quant] = Embedder(out, device=target, precision="high")
        return made[folder, quant]

    return make


@pytest.fixture(scope="module")
def tokens(some_ids: Any) -> list[list[int]]:
    return [some_ids(length, seed=length) for length in LENGTHS]


def close(found: Any, expected: Any, case: EmbeddingCase, tolerance: float) -> None:
    """Each number, those of a vector of length 1 as much closer as they are smaller; the angle."""
    scale = 1.0 if not case.normalized else float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert (np.sum(found * expected, axis=1) / lengths).min() > 1 - 1e-6


def test_embeddings(
    case: EmbeddingCase, folder: Path, embedder: Make, tokens: list[list[int]], tolerance: float
) -> None:
    """Several texts together, and each alone."""
    expected = reference_vectors(folder, tokens, case.pooling, case.normalized)
    if not case.normalized:
        assert 0.5 < np.abs(expected).max() < 40, "too flat to show mistakes"
    runs = embedder(folder, "q0f32")
    close(runs.encode(tokens), expected, case, tolerance)
    close(np.concatenate([runs.encode([ids]) for ids in tokens]), expected, case, tolerance)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, id=each.name)
        for each in EMBEDDINGS
        if each.name in ("bert", "xlm-roberta", "qwen3")
    ],
    indirect=True,
)
@pytest.mark.parametrize("scheme", ["q4f16_1", pytest.param("q8f16_1", marks=pytest.mark.slow)])
def test_quantized_embeddings(
    case: EmbeddingCase, folder: Path, embedder: Make, tokens: list[list[int]], tolerance: float,
    scheme: str, tmp_path: Path, in_f32: Callable[[str], str],
) -> None:  # fmt: skip
    """Against transformers on the dequantized weights, which differ from the checkpoint's."""
    scheme = in_f32(scheme)
    runs = embedder(folder, scheme)
    weights = our_weights(runs.artifact.folder, folder, scheme)
    changed = with_weights(folder, weights, tmp_path / "ours")
    expected = reference_vectors(changed, tokens, case.pooling, case.normalized)
    usual = reference_vectors(folder, tokens, case.pooling, case.normalized)
    assert np.abs(expected - usual).max() > 5 * tolerance
    close(runs.encode(tokens), expected, case, tolerance)


def test_embedding_memory_budget(
    case: EmbeddingCase, folder: Path, embedder: Make, cli: Any
) -> None:
    """What `qcc show` says: weights as they are held, no cache, the temporaries of one pass."""
    runs = embedder(folder, "q0f32")
    found = json.loads(cli("show", runs.artifact.folder, "--json").out)
    (library,) = found["libraries"].values()
    held = [runs.library.device.array(slot).nbytes for slot in runs.library.params]
    assert library["budget"]["weights"] == sum(held) >= found["stored_bytes"]
    assert library["budget"]["kv_cache"] == library["kv_bytes_per_token"] == 0
    (pass_bytes,) = library["memory_usage"].values()
    assert library["budget"]["temporaries"] == pass_bytes
    hidden = case.config.get("hidden_size", case.config.get("n_embd"))
    assert pass_bytes >= 4 * 2 * WINDOW * hidden * 2  # what a layer takes and what it makes
