"""A checkpoint in transformers, bf16 on the CPU, greedy with its KV cache."""

from __future__ import annotations

import time


class Peer:
    """A causal model in torch; see peer_serve. The only kind is bf16."""

    def __init__(self, checkpoint: str, kind: str, folder: str, threads: int) -> None:
        """Load the checkpoint."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.name = f"transformers {transformers.__version__} bf16, torch {torch.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16
        )

    def run(self, case: str, tokens: int, depth: int) -> float:
        """See peer_serve."""
        torch = self.torch
        ids = torch.randint(3, self.model.config.vocab_size, (1, depth + tokens))
        with torch.inference_mode():
            cache = None
            if depth:
                cache = self.model(ids[:, :depth], logits_to_keep=1).past_key_values
            start = time.perf_counter()
            if case == "prefill":
                self.model(ids[:, depth:], past_key_values=cache, logits_to_keep=1)
                return time.perf_counter() - start
            token = ids[:, depth : depth + 1]
            for _ in range(tokens):
                out = self.model(token, past_key_values=cache)
                token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            return time.perf_counter() - start
