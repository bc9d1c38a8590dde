"""config.json and what lies beside it -> the architecture, its config, what the model is for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qcc.compiler.config import ModelConfig, read_json
from qcc.compiler.embedding import (
    EmbeddingFacts,
    as_embedding,
    embedding_facts,
    with_older_norms,
    without_prefix,
)
from qcc.compiler.models import find_architecture, is_headless
from qcc.compiler.models.architecture import Architecture
from qcc.runtime.errors import QccError


def read_model(
    folder: Path, task: str = "auto", names: Collection[str] | None = None
) -> tuple[Architecture, ModelConfig, EmbeddingFacts | None]:
    """What a checkpoint's folder says of its model; None: it generates text.

    Args:
        folder: with config.json.
        task: auto, generation or embedding.
        names: of the checkpoint's tensors; None: not known, so taken to be the usual ones.

    Raises:
        QccError: no such architecture, a key or value that is not implemented, the wrong task.
    """
    where = folder / "config.json"
    raw = read_json(where)
    if not isinstance(raw, dict):
        raise QccError(f"{where}: not a JSON object")
    architecture = find_architecture(raw, str(where))
    config = architecture.config(raw, str(where))
    if task == "auto" and is_headless(raw):
        task = "embedding"
    facts = embedding_facts(folder, task, config)
    if facts is not None and config.states:
        raise QccError(f"{folder}: {config.model_type} is recurrent: it makes no embeddings")
    if facts is not None:
        config = as_embedding(config, facts.pooling)
    if names is not None:
        architecture = with_older_norms(without_prefix(architecture, config, names), names)
    return architecture, config, facts
