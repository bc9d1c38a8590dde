"""The table of architectures: one entry each, a tiny random checkpoint on which mistakes show.

To add an architecture, add a Case. Everything that is checked of each stands in test_numbers.py.
Sizes are odd on purpose: head_dim is not hidden_size / heads, no dimension is a multiple of a
vector or of a group of weights, and `count` tokens reach past every window and rope switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "hidden_size": 84,
    "intermediate_size": 118,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "vocab_size": 361,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


ABSENT = object()  # as a field's value: config.json does not have it
# Multi-head latent attention; the cache's vector has 52 numbers.
LATENT: dict[str, Any] = {
    "head_dim": ABSENT,
    "num_key_value_heads": 6,
    "q_lora_rank": 36,
    "kv_lora_rank": 44,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 28,
}
# Gated delta networks in three of four layers; three value heads share a key.
DELTA: dict[str, Any] = {
    "num_hidden_layers": 5,
    "partial_rotary_factor": 0.4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint of an architecture.

    `config` are fields of config.json, beside those of `base` (TINY's; {} for architectures that
    name them otherwise). transformers makes the checkpoint, or, where it has no such class, the
    module tests/reference/<reference>.py, to whose config() `config` goes. Texts have `count`
    tokens, and the prompts of a batch `lengths`, two of them longer than the windows. `sizes` are
    those of the library, as SizeFlags names them. `quantized` is False where another case of the
    same architecture has the same weights to quantize. Logits above `largest` are scaled down.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    count: int = 120
    lengths: tuple[int, int, int] = (61, 9, 30)
    sizes: Mapping[str, int] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: TINY)
    reference: str | None = None
    quantized: bool = True
    largest: float = 30
    marks: tuple[pytest.MarkDecorator, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """What config.json has that the architecture's defaults are not."""
        found = {**self.base, **self.config}
        return {key: value for key, value in found.items() if value is not ABSENT}


CASES = [
    Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case(
        "llama-tied", "llama", {"num_key_value_heads": 6, "tie_word_embeddings": True},
        quantized=False,
    ),
    Case("mistral", "mistral", {"sliding_window": 24}, sizes={"prefill_chunk": 128}),
    Case("mistral-full", "mistral", {"sliding_window": None}, quantized=False),
    Case(
        "qwen2", "qwen2",
        {"hidden_size": 112, "num_attention_heads": 14, "head_dim": ABSENT, "max_window_layers": 2},
    ),
    Case(
        "gpt_neox", "gpt_neox",
        {
            "hidden_size": 120, "rotary_pct": 0.2, "num_key_value_heads": ABSENT,
            "head_dim": ABSENT,
        },
    ),
    Case(
        "gpt_neox-sequential", "gpt_neox",
        {
            "hidden_size": 120, "rotary_pct": 0.6, "use_parallel_residual": False,
            "num_key_value_heads": ABSENT, "head_dim": ABSENT,
        },
        quantized=False,
    ),
    Case("qwen3", "qwen3"),
    Case(
        "qwen3-windows", "qwen3",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        quantized=False,
    ),
    Case("minicpm", "minicpm", {"hidden_size": 120}, base={}, reference="minicpm"),
    Case("gemma", "gemma"),
    Case(
        "gemma2", "gemma2",
        {
            "sliding_window": 24, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0, "num_hidden_layers": 3,
        },
    ),
    Case("gemma3", "gemma3_text", {"sliding_window": 24, "num_hidden_layers": 7}),
    Case(
        "phi3", "phi3",
        {
            "head_dim": ABSENT, "hidden_size": 120, "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0 + i / 9 for i in range(8)],
                "long_factor": [1.0 + i for i in range(8)],
            },
            "partial_rotary_factor": 0.8, "pad_token_id": 0,
        },
        # transformers takes the short factors for texts of up to 64 tokens.
        lengths=(61, 70, 90),
    ),
    Case(
        "granite", "granite",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7,
            "logits_scaling": 0.5, "head_dim": ABSENT, "hidden_size": 120,
        },
    ),
    Case("smollm3", "smollm3", {"num_hidden_layers": 5}),
    Case("stablelm", "stablelm", {"head_dim": ABSENT, "hidden_size": 96, "use_qkv_bias": True}),
    Case(
        "stablelm-parallel", "stablelm",
        {"head_dim": ABSENT, "hidden_size": 96, "use_parallel_residual": True},
        quantized=False,
    ),
    Case(
        "stablelm-head-norms", "stablelm",
        {
            "head_dim": ABSENT, "hidden_size": 96, "qk_layernorm": True,
            "use_parallel_residual": True,
        },
        quantized=False,
    ),
    Case("olmo2", "olmo2", {"head_dim": ABSENT, "hidden_size": 120}),
    Case(
        "olmo3", "olmo3",
        {
            "head_dim": ABSENT, "hidden_size": 120, "num_hidden_layers": 5, "sliding_window": 24,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    Case("starcoder2", "starcoder2", {"head_dim": ABSENT, "hidden_size": 120}),
    Case("cohere", "cohere", {"head_dim": ABSENT, "hidden_size": 120, "logit_scale": 0.5}),
    Case(
        "cohere-head-norms", "cohere",
        {"head_dim": ABSENT, "hidden_size": 120, "logit_scale": 0.5, "use_qk_norm": True},
        quantized=False,
    ),
    Case(
        "cohere2", "cohere2",
        {
            "head_dim": 20, "hidden_size": 120, "logit_scale": 0.5, "sliding_window": 24,
            "num_hidden_layers": 5,
        },
    ),
    Case("exaone", "exaone", base={}, reference="exaone"),
    Case("exaone4", "exaone4", {"num_hidden_layers": 5, "sliding_window": 24}),
    Case("phi", "phi", {"head_dim": ABSENT, "hidden_size": 96, "num_key_value_heads": 3}),
    Case("glm4", "glm4"),
    Case("nemotron", "nemotron"),
    Case(
        "ministral", "ministral",
        {
            "sliding_window": 24, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Case("internlm2", "internlm2", {"hidden_size": 120}, base={}, reference="internlm2"),
    Case("baichuan", "baichuan", {"hidden_size": 120, "version": 1}, base={}, reference="baichuan"),
    # The original normalizes its head's rows, ours are stored so: quantized ones are a bit off 1.
    Case(
        "baichuan2", "baichuan", {"hidden_size": 120, "version": 2}, base={}, reference="baichuan",
        quantized=False,
    ),
    Case(
        "gpt2", "gpt2",
        {"n_embd": 84, "n_layer": 2, "n_head": 3, "n_positions": 256, "vocab_size": 361},
        base={},
    ),
    Case(
        "minicpm3", "minicpm3",
        {
            **LATENT, "dim_model_base": 50, "scale_emb": 3, "rope_scaling": {
                "type": "longrope", "short_factor": [1.0, 1.3, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 7.0], "original_max_position_embeddings": 8,
            },
        },
    ),
    Case(
        "deepseek_v2", "deepseek_v2",
        {
            **LATENT, "n_routed_experts": 12, "num_experts_per_tok": 4,
            "n_shared_experts": 2, "moe_intermediate_size": 44, "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 1.7, "rope_scaling": {
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                "mscale": 0.7, "mscale_all_dim": 0.9,
            },
        },
    ),
    Case(
        "deepseek_v2-lite", "deepseek_v2",
        {
            **LATENT, "q_lora_rank": None, "n_routed_experts": 5, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "moe_intermediate_size": 44, "first_k_dense_replace": 0,
        },
        quantized=False,
    ),
    Case(
        "deepseek_v3", "deepseek_v3",
        {
            **LATENT, "n_routed_experts": 12, "num_experts_per_tok": 4,
            "n_shared_experts": 1, "moe_intermediate_size": 44, "first_k_dense_replace": 1,
            "n_group": 4, "topk_group": 2, "rope_scaling": {
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
    ),
    Case(
        "deepseek_v3-halves", "deepseek_v3",
        {
            **LATENT, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44,
            "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
            "rope_interleave": False, "attention_bias": True,
        },
        quantized=False,
    ),
    # torch multiplies with experts whose rows are multiples of 16 bytes only.
    Case("mixtral", "mixtral", {"num_local_experts": 5, "intermediate_size": 116}),
    Case(
        "mixtral-windows", "mixtral",
        {"num_local_experts": 3, "intermediate_size": 52, "sliding_window": 24},
        sizes={"prefill_chunk": 128}, quantized=False,
    ),
    Case(
        "qwen2_moe", "qwen2_moe",
        {
            "num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 3,
            "moe_intermediate_size": 44, "shared_expert_intermediate_size": 52,
            "mlp_only_layers": [1],
        },
    ),
    Case(
        "qwen3_moe", "qwen3_moe",
        {
            "num_hidden_layers": 2, "num_experts": 17, "num_experts_per_tok": 4,
            "moe_intermediate_size": 44, "norm_topk_prob": True, "decoder_sparse_step": 2,
        },
    ),
    # At logits of 25 f32's rounding shows in single positions: of qwen3_next transformers itself
    # is 8e-4 off f64; of qwen3_5 in 4 bits qcc is 2e-4 off at most, rms 1.2e-5 (its own 1.0e-5);
    # of qwen3_5-eye transformers is 2.7e-4 off, qcc 1.1e-4 (rms 1.2e-5 and 1.0e-5).
    Case("qwen3_5", "qwen3_5_text", DELTA, largest=20),
    Case(
        "qwen3_5-eye", "qwen3_5",
        {
            "text_config": {**TINY, **DELTA, "num_hidden_layers": 4},
            "vision_config": {
                "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                "out_hidden_size": 84, "num_position_embeddings": 16, "patch_size": 4,
            },
        },
        base={}, quantized=False, largest=20,
    ),
    Case(
        "qwen3_5-order", "qwen3_5_text",
        {
            **DELTA, "num_hidden_layers": 3, "attention_bias": True, "tie_word_embeddings": True,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 9,
            "linear_conv_kernel_dim": 2, "rope_parameters": {
                "rope_theta": 1000.0, "rope_type": "default", "partial_rotary_factor": 0.8,
                "mrope_interleaved": True, "mrope_section": [4, 2, 2],
            },
        },
        quantized=False,
    ),
    Case(
        "falcon_h1", "falcon_h1",
        {
            "head_dim": 20, "mamba_d_ssm": 72, "mamba_n_heads": 6, "mamba_d_state": 28,
            "mamba_n_groups": 2, "key_multiplier": 0.7, "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 1.3, "embedding_multiplier": 3.0,
            "mlp_multipliers": [1.4, 0.6], "lm_head_multiplier": 0.5,
            "ssm_multipliers": [0.9, 1.2, 0.8, 1.1, 0.7], "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.75, "pad_token_id": 0,
        },
    ),
    Case(
        "falcon_h1-norm", "falcon_h1",
        {
            "mamba_d_ssm": 72, "mamba_n_heads": 6, "mamba_d_state": 28, "mamba_n_groups": 2,
            "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_conv_bias": False,
            "projectors_bias": True, "time_step_limit": [0.1, 1.5], "pad_token_id": 0,
            "attention_bias": True, "mlp_bias": True,
        },
        quantized=False,
    ),
    Case(
        "qwen3_next", "qwen3_next",
        {
            **DELTA, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 44,
            "shared_expert_intermediate_size": 52, "mlp_only_layers": [1],
        },
        largest=20,
    ),
    Case(
        "olmoe", "olmoe",
        {
            "head_dim": ABSENT, "hidden_size": 120, "num_experts": 9, "num_experts_per_tok": 3,
            "intermediate_size": 44, "pad_token_id": 0,
        },
    ),
    Case(
        "gpt_oss", "gpt_oss",
        {
            "num_hidden_layers": 3, "num_local_experts": 7, "num_experts_per_tok": 3,
            "intermediate_size": 52, "sliding_window": 24, "swiglu_limit": 1.5,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                "truncate": False,
            },
        },
    ),
]  # fmt: skip
PARAMETERS = [pytest.param(case, id=case.name, marks=case.marks) for case in CASES]
# Their weights are mapped and multiplied as others are: quantized only with -m slow.
USUAL = {
    *("mistral", "qwen3", "minicpm", "gemma", "gemma3", "granite", "smollm3", "stablelm", "olmo2"),
    *("olmo3", "starcoder2", "cohere2", "exaone", "exaone4", "phi", "nemotron", "ministral"),
    *("qwen3_moe", "olmoe", "deepseek_v2"),
}
QUANTIZED = [
    pytest.param(
        case,
        id=case.name,
        marks=[*case.marks, *([pytest.mark.slow] if case.name in USUAL else [])],
    )
    for case in CASES
    if case.quantized
]
assert {case.name for case in CASES} > USUAL
