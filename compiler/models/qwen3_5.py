"""Qwen3.5 as it is published, with an eye: its text model, whose tensors are named otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig, shown
from qcc.compiler.models import qwen3_5_text
from qcc.compiler.models.architecture import WeightSource
from qcc.runtime.errors import QccError

OUTER, INNER = "model.", "model.language_model."


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a Qwen3_5ForConditionalGeneration; one of the text model alone will do."""
    reader = ConfigReader(raw, where)
    text = reader.get("text_config")
    if text is None:
        return replace(qwen3_5_text.read_config(raw, where), model_type="qwen3_5")
    if not isinstance(text, dict):
        raise QccError(f"{where}: text_config is {shown(text)}, it must be a mapping")
    for key in ("vision_config", "language_model_only", "image_token_id", "video_token_id"):
        reader.get(key)
    for key in ("vision_start_token_id", "vision_end_token_id"):
        reader.get(key)
    tied = reader.flag("tie_word_embeddings", bool(text.get("tie_word_embeddings", False)))
    reader.finish()
    config = qwen3_5_text.read_config(text, f"{where}: text_config")
    if config.tie_word_embeddings != tied:
        raise QccError(
            f"{where}: tie_word_embeddings is {tied}, of text_config it is {not tied}; keep the "
            "one that the model was trained with"
        )
    return replace(config, model_type="qwen3_5")


def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """The text model's tensors are within the whole model's."""
    found = qwen3_5_text.ARCHITECTURE.source(config, name, shape)
    tensors = (replace(s, name=s.name.replace(OUTER, INNER, 1)) for s in found.sources)
    return replace(found, sources=tuple(tensors))


ARCHITECTURE = replace(
    qwen3_5_text.ARCHITECTURE,
    model_type="qwen3_5",
    hf_names=("Qwen3_5ForConditionalGeneration",),
    description="Qwen3.5 0.8B to 27B, their text part",
    config=read_config,
    source=source,
    ignored=("mtp.*", "model.visual.*"),
)
