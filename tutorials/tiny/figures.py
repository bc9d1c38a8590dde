"""The figures of the tiny model: held-out perplexity, and that of a unigram model beside it.

Both predict the same tokens: every token of every held-out story but the BOS in front of it.
The weights are the stored bf16 ones, the arithmetic is fp32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from qcc.tutorials.tiny.make_text import read
from qcc.tutorials.tiny.tokenizer import VOCAB, load_tokenizer


@dataclass(frozen=True)
class Figures:
    """Perplexities over ``tokens`` predicted tokens."""

    tokens: int
    model: float
    unigram: float

    @property
    def ratio(self) -> float:
        return self.unigram / self.model


def unigram_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs in the texts, BOS left out."""
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return counts


def measure(model_dir: Path, heldout: Path, train_texts: Iterable[str]) -> Figures:
    """Held-out perplexity of the model and of an add-one unigram model of the training texts."""
    tokenizer = load_tokenizer(model_dir)
    counts = unigram_counts(tokenizer, train_texts)
    total = sum(counts.values()) + VOCAB  # add-one: every token is seen once more
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    n, nll_model, nll_unigram = 0, 0.0, 0.0
    for text in read(heldout):
        ids = tokenizer.encode(text).ids  # begins with BOS
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        target = torch.tensor(ids[1:])
        nll_model += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        nll_unigram -= sum(math.log((counts[i] + 1) / total) for i in ids[1:])
        n += len(ids) - 1
    return Figures(n, math.exp(nll_model / n), math.exp(nll_unigram / n))


def samples(model_dir: Path) -> list[tuple[str, str]]:
    """Prompt -> continuation: plain text and chat, greedy and sampled with a fixed seed."""
    tokenizer = load_tokenizer(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def go(prompt: str, sample: bool) -> tuple[str, str]:
        torch.manual_seed(0)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        how = {"do_sample": True, "temperature": 0.8} if sample else {"do_sample": False}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=500, **how)
        return prompt, tokenizer.decode(out[0, ids.shape[1] :].tolist())

    prompts = ["Once upon a time, there was"]
    prompts += [
        f"<|user|>{q}<|end|><|assistant|>"
        for q in (
            "Tell me a story about a fox named Mia.", "What is two plus three?", "What is 7 + 8?",
            "Ben has a red kite. Lily has a blue ball. Who has the red kite?",
            "What day comes after Friday?", "Count from three to nine.", "Who are you?",
        )
    ]  # fmt: skip
    system = "<|system|>You are an owl named Hugo.<|end|>"
    prompts.append(f"{system}<|user|>Who are you?<|end|><|assistant|>")
    return [go(p, False) for p in prompts] + [go(p, True) for p in prompts[:2]]
