"""Tiny embedding models, and their vectors by transformers and the poolings' definitions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .conftest import randomize, write_tokenizer

STEPS = "sentence_transformers.models."
FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
FLAGS["last"] = "pooling_mode_lasttoken"
BEGIN, END = 1, 2  # tokens of tests/conftest.py's tokenizer
# Sizes of transformers' BertConfig that are odd: a head has 20 numbers.
BERT: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 86,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 361,
    "max_position_embeddings": 128,
    "type_vocab_size": 3,
}
TEXTS = [
    "a cat on a mat",
    "y",
    "The seven green bottles that hang on the wall of the old house by the sea.",
    "eleven words of which the last one is the very last",
]


def save_embedding(
    folder: Path,
    model_type: str,
    fields: Mapping[str, Any],
    pooling: str | None = "mean",
    normalized: bool = True,
    prompts: Mapping[str, str] | None = None,
    head: bool = False,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint as sentence-transformers keeps it; returns the folder.

    `head`: transformers' class for masked tokens, or for text, writes it. `pooling` None: none of
    sentence-transformers' files. Texts begin with <s> and end with </s>.
    """
    import torch
    from tokenizers import Tokenizer, processors
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    config = AutoConfig.for_model(model_type, **{"pad_token_id": 0, **fields})
    headed = AutoModelForMaskedLM if "bert" in model_type else AutoModelForCausalLM
    model = (headed if head else AutoModel).from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if pooling is not None:
        _write_steps(folder, pooling, normalized, dict(prompts or {}))
    return folder


def _write_steps(folder: Path, pooling: str, normalized: bool, prompts: dict[str, str]) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalized else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    steps = [
        {"idx": i, "name": str(i), "path": paths[i], "type": STEPS + kind}
        for i, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    flags = {flag: kind == pooling for kind, flag in FLAGS.items()}
    for path, content in (
        ("modules.json", steps),
        ("1_Pooling/config.json", {"word_embedding_dimension": 60, **flags}),
        ("config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None}),
    ):
        (folder / path).write_text(json.dumps(content), encoding="utf-8")


def reference_vectors(
    folder: Path, tokens: Sequence[Sequence[int]], pooling: str, normalized: bool
) -> Any:
    """f32[b, h]: transformers in f32, one text at a time, and the pooling written out in torch."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    found = []
    for ids in tokens:
        with torch.no_grad():
            states = model(torch.tensor([list(ids)])).last_hidden_state[0]  # [n, h]
        vector = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
        found.append(vector / vector.norm() if normalized else vector)
    return torch.stack(found).numpy()


def with_weights(folder: Path, weights: Mapping[str, Any], copy: Path) -> Path:
    """A copy of a checkpoint with other numbers; what `weights` lacks stays."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    assert set(weights) <= set(tensors)
    assert {name: a.shape for name, a in weights.items()} == {
        name: tensors[name].shape for name in weights
    }
    save_file({**tensors, **weights}, file, {"format": "pt"})
    return copy
