"""config.json of mixtures of experts: the released ones, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from qcc.compiler.config import ExpertsConfig
from qcc.compiler.models import find_architecture
from qcc.runtime.errors import QccError
from qcc.tutorials.published_shapes import SHAPES

_SIZES = {
    "hidden_act": "silu", "attention_dropout": 0.0, "output_router_logits": False,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
MIXTRAL = {
    **_SIZES, "architectures": ["MixtralForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {  # Qwen1.5-MoE-A2.7B
    **_SIZES, "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1,
    "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {  # Qwen3-30B-A3B
    **_SIZES, "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rope_scaling": None, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
OLMOE = {
    **_SIZES, "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None,
    "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rope_scaling": None, "router_aux_loss_coef": 0.01, "vocab_size": 50304,
}  # fmt: skip
GPT_OSS = SHAPES["gpt-oss-20b"]
ALL = [MIXTRAL, QWEN2, QWEN3, OLMOE, GPT_OSS]
IDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]


def read(raw: dict[str, Any]) -> Any:
    return find_architecture(raw, "config.json").config(raw, "config.json")


def test_released_mixtures() -> None:
    assert [read(raw).experts for raw in ALL] == [
        ExpertsConfig(8, 2, 14336, normalized=True),
        ExpertsConfig(60, 4, 1408, normalized=False, shared_size=5632),
        ExpertsConfig(128, 8, 768, normalized=True),
        ExpertsConfig(64, 8, 1024, normalized=False),
        ExpertsConfig(32, 4, 2880, normalized=True, swiglu=(1.702, 7.0)),
    ]
    assert all(read(raw).sliding_window is None for raw in ALL)
    windowed = [sum(read(raw).windowed) for raw in ALL]
    assert windowed == [0, 0, 0, 0, 12] and read(GPT_OSS).layer_window == 128


def test_what_transformers_5_writes() -> None:
    """Another name for Qwen3's number of experts, and a window of 0 where there is none."""
    renamed = {key: value for key, value in QWEN3.items() if key != "num_experts"}
    assert read({**renamed, "num_local_experts": 128}) == read(QWEN3)
    assert read({**QWEN2, "sliding_window": 0}) == read(QWEN2)


def test_layers_without_experts() -> None:
    dense = read({**QWEN2, "mlp_only_layers": [0, 5], "num_hidden_layers": 6}).experts.dense_layers
    assert dense == (0, 5)
    step = read({**QWEN3, "decoder_sparse_step": 3, "num_hidden_layers": 7}).experts.dense_layers
    assert step == (0, 1, 3, 4, 6)


def test_windows() -> None:
    """As transformers 5 has them: every second layer of Qwen2's, all of Qwen3's and Mixtral's."""
    used = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 4}
    found = read({**QWEN2, **used, "max_window_layers": 3})
    assert (found.layer_window, found.windowed) == (64, (True, False, True, False))
    assert (
        read({**QWEN3, **used}).sliding_window
        == read({**MIXTRAL, **used_of(used)}).sliding_window
        == 64
    )


def used_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != "use_sliding_window"}


@pytest.mark.parametrize(
    ("raw", "fields", "words"),
    [
        (OLMOE, {"clip_qkv": 8.0}, "unknown key 'clip_qkv' = 8.0"),
        (OLMOE, {"num_experts_per_tok": 65}, "num_experts_per_tok is 65, of 64 experts"),
        (MIXTRAL, {"num_local_experts": 1}, "num_experts_per_tok is 2, of 1 experts"),
        (QWEN3, {"mlp_only_layers": ["x"]}, "mlp_only_layers is \\['x'\\], no list of layers"),
        (QWEN3, {"mlp_only_layers": 3}, "mlp_only_layers is 3, no list of layers"),
        (QWEN2, {"num_experts": 0}, "num_experts is 0, it must be a whole number >= 1"),
        (QWEN2, {"num_experts": 10**9}, "num_experts is 1000000000, .* <= 4096"),
        (QWEN2, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (MIXTRAL, {"moe_intermediate_size": 7}, "unknown key 'moe_intermediate_size'"),
        (GPT_OSS, {"num_key_value_heads": 1, "head_dim": 32}, "at most head_dim 32 are supported"),
    ],
)
def test_refused(raw: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(QccError, match=words):
        read({**raw, **fields})


@pytest.mark.parametrize("raw", ALL, ids=IDS)
def test_junk_in_any_key(raw: dict[str, Any]) -> None:
    """A QccError of one line, or a config; nothing else."""
    for key in raw:
        for value in (None, True, 0, -1, 3, 2.5, 10**30, float("nan"), "", "x", [], {}, [1], ["x"]):
            try:
                read({**raw, key: value})
            except QccError as err:
                assert "config.json" in str(err) and "\n" not in str(err), (key, value)
