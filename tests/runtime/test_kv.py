"""The KV cache's storage is chosen when a model is loaded, and one library has them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcc.runtime import LLM
from qcc.runtime.engine.settings import default_kv
from qcc.runtime.errors import QccError


@pytest.fixture(scope="module")
def llm(compiled: Any, checkpoint: Any) -> Any:
    return compiled(checkpoint("llama"))


def test_what_is_kept_tells_in_the_logits(llm: Any, some_ids: Any) -> None:
    """Rounded keys change logits a little, more so to int8; two ways to the same text agree."""
    folder, ids = llm.artifact.folder, some_ids(200)
    errors = {}
    for kv in ("f32", "f16", "int8"):
        other = LLM(folder, precision="high", kv=kv)
        found = other.logits(ids)
        errors[kv] = float(np.abs(found - llm.logits(ids)).max())
        chunks = np.split(np.array(ids, np.int32), [50, 51, 120])
        other.model.add_sequence(0)
        parts = [other.model.verify(0, part) for part in chunks]
        np.testing.assert_allclose(np.concatenate(parts), found, rtol=0, atol=2e-3)
        assert other.model.library.metadata.kv == kv
    assert errors["f32"] == 0 < errors["f16"] < 0.05 < errors["int8"] < 1


def test_the_default_goes_with_the_precision(compiled: Any, checkpoint: Any) -> None:
    assert (default_kv("low"), default_kv("high")) == ("f16", "f32")
    llm = compiled(checkpoint("llama"), "q4f16_1", low=True)
    assert llm.model.library.metadata.kv == "f32"  # its precision is high
    low = LLM(llm.artifact.folder).model.library.metadata.kv
    assert low.removesuffix("_tiles") == "f16"


def test_an_unknown_storage_is_named(llm: Any) -> None:
    with pytest.raises(QccError, match=r"^--kv f8: the library's cache keeps f32, f16, int8$"):
        LLM(llm.artifact.folder, kv="f8")
