"""RoBERTa: BERT whose positions begin behind the padding token's number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.bert import FLOATING, IGNORED, encoder_source, read_encoder
from qcc.compiler.models.encoder import Encoder
from qcc.runtime.errors import QccError


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a RobertaModel, or of one with a head that is left out."""
    return read_roberta(raw, where, "roberta")


def read_roberta(raw: dict[str, Any], where: str, model_type: str) -> ModelConfig:
    """The config; max_position_embeddings counts rows of the table, of which the first go unused.

    With padding token p the first token of a text has row p + 1.
    """
    reader = ConfigReader(raw, where)
    unused = reader.integer("pad_token_id", 1, minimum=0) + 1
    config = read_encoder(reader, model_type, unused_positions=unused)
    left = config.max_position_embeddings - unused
    if left < 1:
        raise QccError(
            f"{where}: max_position_embeddings {config.max_position_embeddings} leaves no position "
            f"behind pad_token_id {unused - 1}"
        )
    return replace(config, max_position_embeddings=left)


ARCHITECTURE = Architecture(
    model_type="roberta",
    hf_names=("RobertaModel", "RobertaForMaskedLM"),
    description="RoBERTa and embedding models on it: all-roberta, all-distilroberta",
    config=read_config,
    module=Encoder,
    source=encoder_source("roberta"),
    ignored=IGNORED,
    floating=FLOATING,
)
