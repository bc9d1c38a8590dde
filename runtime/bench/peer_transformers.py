"""The peer: a checkpoint in transformers, bf16 on the CPU, greedy with its KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence


class TransformersPeer:
    """A causal model in torch on `threads` threads."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        """Load the checkpoint in bf16."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.name = f"transformers {transformers.__version__} bf16, torch {torch.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16
        )

    def measure(self, prompt: Sequence[int], generate: int) -> tuple[float, float]:
        """(prefill tok/s, decode tok/s) of one run."""
        torch = self.torch
        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(torch.tensor([list(prompt)]), logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(generate):
                out = self.model(token, past_key_values=out.past_key_values)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            end = time.perf_counter()
        return len(prompt) / (first - start), generate / (end - first)
