"""What the page reads: shards, metadata, the texts of an embedding model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime.engine.embedder import unit
from qcc.runtime.engine.tokenizer import Tokenizer

Ask = Callable[[str, Any], Any]


def test_md5(ask: Ask) -> None:
    """At all lengths around a block's."""
    sizes = [*range(130), 1000, 65536, 1_000_003]
    pattern = bytes((i * 7 + 3) & 255 for i in range(256))
    data = pattern * (max(sizes) // 256 + 1)
    assert ask("md5", sizes) == [hashlib.md5(data[:size]).hexdigest() for size in sizes]


def test_upper_halves_become_float32(ask: Ask) -> None:
    """f32-to-bf16: the bits that are stored, zeros below."""
    stored = np.random.default_rng(0).integers(0, 2**16, 50, dtype=np.uint16)
    found = ask("upperHalves", list(stored.tobytes()))
    assert bytes(found) == (stored.astype(np.uint32) << 16).tobytes()


def metadata(**changes: Any) -> dict[str, Any]:
    """Of a library with one parameter."""
    param = {"name": "w", "shape": [2, 3], "dtype": "float16"}
    slot = {**param, "from": ["w"], "repack": None, "setting": None}
    own = {"format": 1, "page_size": 16, "vocab_size": 8, "slots": [slot], "states": []}
    return {"params": [param], "qcc": {**own, "extents": [], **changes}}


def shards(**changes: Any) -> dict[str, Any]:
    """A tensor-cache.json with that parameter."""
    record = {"name": "w", "shape": [2, 3], "dtype": "float16", "format": "raw", "nbytes": 12}
    record |= {"byteOffset": 4, **changes}
    shard = {"dataPath": "params_shard_0.bin", "nbytes": 16, "md5sum": "", "records": [record]}
    return {"records": [shard]}


REPACKED = [{"name": "w", "from": ["w"], "repack": "f", "setting": None}]


@pytest.mark.parametrize(
    ("library", "files", "told"),
    [
        ({}, {}, ""),
        ({"format": 2}, {}, "the library is of format 2, this page runs format 1"),
        ({"states": [{}]}, {}, "models whose layers keep states are not run in the browser yet"),
        ({"slots": REPACKED}, {}, "wants its weights in another layout"),
        ({}, {"name": "v"}, "tensor w is missing, the library wants float16[2,3]"),
        ({}, {"shape": [3, 2]}, "tensor w is float16[3,2], the library wants float16[2,3]"),
        ({}, {"nbytes": 10}, "T: tensor w does not fit params_shard_0.bin"),
        ({}, {"byteOffset": 5}, "T: tensor w does not fit params_shard_0.bin"),
        ({}, {"dtype": "float64"}, "T: has dtype float64"),
    ],
)
def test_what_does_not_fit(ask: Ask, library: Any, files: Any, told: str) -> None:
    """Library and weights of different compiles, and what this page does not run."""
    (found,) = ask("libraries", [{"metadata": metadata(**library), "shards": shards(**files)}])
    assert told in found and bool(found) == bool(told)


def test_context_windows(ask: Ask) -> None:
    """What was asked for, what was compiled for, and what a buffer of the GPU holds."""
    own = {"kv_storages": {"f16": {"token_values": 256}}, "compute_dtype": "float16"}
    full = {"context_window_size": 4096, "sliding_window_size": -1, "qcc": own}
    slides = {"context_window_size": -1, "sliding_window_size": 1024, "qcc": own}
    encoder = {**full, "qcc": {**own, "kv_storages": {}}}
    page = 16 * 256 * 2  # bytes of a layer's keys and values
    cases = [
        (full, None, 2**27, 4096),
        (full, 100, 2**27, 100),
        (full, 5000, 2**27, "contextWindowSize 5000: the library was compiled for 1 to 4096"),
        (full, 0, 2**27, "contextWindowSize 0"),
        (full, None, 65 * page, 1024),
        (full, None, 65 * page - 1, 1008),
        (full, 1025, 65 * page, "one buffer of which holds 1024 tokens"),
        (full, None, page, "one buffer of which holds 0 tokens"),
        (slides, None, 67 * page, 1024),
        (slides, None, 67 * page - 1, "one buffer of which holds 1008 tokens"),
        (slides, 64, 2**27, "a sliding window of 1024 tokens and no bound"),
        (encoder, None, 1000, 4096),
    ]
    asked = [{"metadata": meta, "wanted": size, "limit": limit} for meta, size, limit, _ in cases]
    for found, (*_, wanted) in zip(ask("windows", asked), cases, strict=True):
        assert found == wanted or (isinstance(wanted, str) and wanted in found), (found, wanted)


LIMITS = {"window": 12, "chunk": 20, "batch": 3, "dimensions": 12}
USAGE = {"prompts": {"query": "Find: "}, "default_prompt": None, "lower_case": True}


def test_texts_of_an_embedding_model(ask: Ask, bundled: Path) -> None:
    """Prompt, case, window, passes that hold what fits, shorter vectors of length 1."""
    mine = Tokenizer(bundled, {})
    texts = ["One boat", "Two BOATS and a long, long tale of many more words", "x", "y", "z"]
    argument = {"folder": str(bundled), "chat": {"embedding": USAGE}, "limits": LIMITS}
    argument |= {"texts": texts, "options": {"promptName": "query", "dimensions": 5}}
    found = ask("embeddings", argument)
    ids = [mine.encode_within(f"find: {text.lower()}", 12)[0] for text in texts]
    padded = np.array([[*row, *[0] * (12 - len(row))] for row in ids], np.float32)
    np.testing.assert_allclose(found["vectors"], unit(padded[:, :5]), rtol=1e-6)
    assert [len(ends) for ends in found["passes"]] == passes_of([len(row) for row in ids])

    def told(**options: Any) -> str:
        return str(ask("embeddings", {**argument, "options": options})["error"])

    assert "prompt passage: the model has query" in told(promptName="passage")
    assert "dimensions 13: the model has 1 to 12" in told(dimensions=13)
    assert "text 2 has" in told(truncate=False) and "the window is 12" in told(truncate=False)


def passes_of(sizes: list[int]) -> list[int]:
    """Texts a pass: as many as fit 20 tokens, at most 3."""
    passes: list[list[int]] = [[]]
    for size in sizes:
        if passes[-1] and (sum(passes[-1]) + size > 20 or len(passes[-1]) == 3):
            passes.append([])
        passes[-1].append(size)
    return [len(each) for each in passes]
