"""config.json of models with gated delta networks: as released, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from qcc.compiler.config import ExpertsConfig
from qcc.compiler.models import find_architecture
from qcc.compiler.recurrent_config import DeltaConfig, StateTensor
from qcc.runtime.errors import QccError

_LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_value_head_dim": 128,
}  # fmt: skip
_KINDS = ["linear_attention"] * 3 + ["full_attention"]
TEXT = {  # of Qwen3.5-9B
    **_LINEAR, "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
    "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "layer_types": _KINDS * 8, "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16,
    "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 248320,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
}  # fmt: skip
WHOLE = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056,
    "model_type": "qwen3_5", "text_config": TEXT, "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0", "video_token_id": 248057,
    "vision_config": {"depth": 27, "hidden_size": 1152}, "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}  # fmt: skip
NEXT = {  # Qwen3-Next-80B-A3B
    **_LINEAR, "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False,
    "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5120, "max_position_embeddings": 262144,
    "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True,
    "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip


def read(raw: dict[str, Any]) -> Any:
    return find_architecture(raw, "config.json").config(raw, "config.json")


def test_released_models() -> None:
    """Every fourth layer has attention, rotated by a quarter of its head."""
    text, whole, experts = read(TEXT), read(WHOLE), read(NEXT)
    assert (text.model_type, whole.model_type) == ("qwen3_5_text", "qwen3_5")
    for config, layers in ((text, 32), (whole, 32), (experts, 48)):
        linear = (True, True, True, False) * (layers // 4)
        assert config.delta == DeltaConfig(16, 32, 128, 128, 4, linear)
        assert config.cache_layers == tuple(range(3, layers, 4))
        assert (config.head_dim, config.rope.rotary_dim, config.rope.theta) == (256, 64, 1e7)
    assert experts.experts == ExpertsConfig(512, 10, 512, normalized=True, shared_size=512)
    assert text.states[2:4] == (
        StateTensor("layers.1.conv", (3, 8192)),
        StateTensor("layers.1.delta", (32, 128, 128)),
    )


def test_layers_by_their_interval() -> None:
    """Where layer_types is absent."""
    raw = {key: value for key, value in TEXT.items() if key != "layer_types"}
    assert read(raw) == read(TEXT)
    assert read({**raw, "full_attention_interval": 16}).cache_layers == (15, 31)


def test_attention_alone_keeps_no_states() -> None:
    config = read({**TEXT, "layer_types": ["full_attention"] * 32})
    assert config.states == () and len(config.cache_layers) == 32


def test_tied_tables() -> None:
    """The whole model's word counts, where it says one."""
    tied = {**TEXT, "tie_word_embeddings": True}
    assert read({**WHOLE, "tie_word_embeddings": True, "text_config": tied}).tie_word_embeddings
    silent = {key: value for key, value in WHOLE.items() if key != "tie_word_embeddings"}
    assert read({**silent, "text_config": tied}).tie_word_embeddings
    with pytest.raises(QccError, match="tie_word_embeddings is True, of text_config it is False"):
        read({**WHOLE, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("raw", "fields", "words"),
    [
        (TEXT, {"linear_num_value_heads": 24}, "linear_num_value_heads 24 is not a multiple of l"),
        (TEXT, {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1, .* >= 2"),
        (TEXT, {"linear_key_head_dim": 10**9}, "linear_key_head_dim is 1000000000, .* <= 4096"),
        (TEXT, {"layer_types": _KINDS}, "layer_types is .*; it must name each of 32 layers"),
        (TEXT, {"layer_types": ["conv"] * 32}, "layer_types is .* linear_attention or full_att"),
        (TEXT, {"layer_types": _KINDS[:1] * 32}, "no layer has full_attention; such models are"),
        (TEXT, {"full_attention_interval": 0}, "full_attention_interval is 0"),
        (TEXT, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (TEXT, {"attn_output_gate": False}, "attn_output_gate false is not supported"),
        (TEXT, {"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid' is not supported"),
        (TEXT, {"linear_window": 7}, "unknown key 'linear_window' = 7"),
        (NEXT, {"use_sliding_window": True}, "unknown key 'use_sliding_window' = True"),
        (WHOLE, {"text_config": 3}, "text_config is 3, it must be a mapping"),
        (WHOLE, {"text_confg": {"a": 1}}, "unknown key 'text_confg' .*did you mean 'text_config'"),
        (WHOLE, {"text_config": {**TEXT, "x": 1}}, "text_config: unknown key 'x' = 1"),
    ],
)
def test_refused(raw: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(QccError, match=words):
        read({**raw, **fields})


@pytest.mark.parametrize("raw", [TEXT, WHOLE, NEXT], ids=["text", "whole", "next"])
def test_junk_in_any_key(raw: dict[str, Any]) -> None:
    """A QccError of one line, or a config; nothing else."""
    for key in raw:
        for value in (None, True, 0, -1, 3, 2.5, 10**30, float("nan"), "", "x", [], {}, [1], ["x"]):
            try:
                read({**raw, key: value})
            except QccError as err:
                assert "\n" not in str(err)
