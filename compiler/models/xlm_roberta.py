"""XLM-RoBERTa: RoBERTa with another vocabulary."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ModelConfig
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.bert import FLOATING, IGNORED, encoder_source
from qcc.compiler.models.encoder import Encoder
from qcc.compiler.models.roberta import read_roberta


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of an XLMRobertaModel, or of one with a head that is left out."""
    return read_roberta(raw, where, "xlm-roberta")


ARCHITECTURE = Architecture(
    model_type="xlm-roberta",
    hf_names=("XLMRobertaModel", "XLMRobertaForMaskedLM"),
    description="XLM-RoBERTa and embedding models on it: BGE-M3 (dense), multilingual E5",
    config=read_config,
    module=Encoder,
    source=encoder_source("roberta"),
    ignored=IGNORED,
    floating=FLOATING,
)
