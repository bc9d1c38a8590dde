"""config.json of Falcon-H1: its sizes, its many scales, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from qcc.compiler.models import find_architecture
from qcc.compiler.models.mamba import mamba_channels, mamba_rows
from qcc.compiler.recurrent_config import DeltaConfig, MambaConfig, StateTensor
from qcc.runtime.errors import QccError

FALCON = {
    "architectures": ["FalconH1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "attn_layer_indices": None,
    "embedding_multiplier": 5.65, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 2048, "key_multiplier": 0.39, "lm_head_multiplier": 0.039,
    "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
    "mamba_d_ssm": 1536, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_n_heads": 24, "mamba_norm_before_gate": False, "mamba_proj_bias": False,
    "mamba_rms_norm": False, "mamba_use_mlp": True, "max_position_embeddings": 16384,
    "mlp_bias": False, "mlp_expansion_factor": 8, "mlp_multipliers": [0.88, 0.58],
    "model_type": "falcon_h1", "num_attention_heads": 8, "num_hidden_layers": 36,
    "num_key_value_heads": 2, "num_logits_to_keep": 1, "projectors_bias": False,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 100000000000.0,
    "ssm_in_multiplier": 1.25, "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35],
    "ssm_out_multiplier": 0.24, "time_step_floor": 0.0001, "time_step_max": 0.1,
    "time_step_min": 0.001, "tie_word_embeddings": False, "vocab_size": 32784,
}  # fmt: skip
SIZES = DeltaConfig(1, 24, 128, 64, 4, (True,) * 36, corrects=False, beside=True, conv_bias=True)


def read(raw: dict[str, Any]) -> Any:
    return find_architecture(raw, "config.json").config(raw, "config.json")


def test_sizes_and_scales() -> None:
    config = read(FALCON)
    assert config.delta == SIZES
    assert config.cache_layers == tuple(range(36)), "every layer has attention as well"
    assert config.states[2:4] == (
        StateTensor("layers.1.conv", (3, 1536 + 2 * 128)),
        StateTensor("layers.1.delta", (24, 128, 64)),
    )
    assert config.attention_scale == pytest.approx(0.39 / 8)
    assert (config.embedding_scale, config.logit_scale) == (5.65, 0.039)
    assert config.mamba == MambaConfig(
        multipliers=tuple(1.25 * each for each in FALCON["ssm_multipliers"]),
        scales=(0.24, 1.0, 0.9375, 0.88, 0.58),
    )


def test_defaults_that_follow_from_others() -> None:
    assert read({**FALCON, "mamba_d_head": "auto"}) == read(FALCON)
    wide = read({**FALCON, "mamba_d_ssm": None, "mamba_n_heads": 32})
    assert wide.delta.values == 2 * 1024
    after = {**FALCON, "mamba_rms_norm": True}
    assert read(after).mamba.norm == "after"
    assert read({**after, "mamba_norm_before_gate": True}).mamba.norm == "before"


@pytest.mark.parametrize("text", ['[0.0, {"__float__": "Infinity"}]', "[0.0, Infinity]"])
def test_a_step_without_a_limit(text: str) -> None:
    """As transformers 5 writes it, and as older ones did."""
    found = read({**FALCON, "time_step_limit": json.loads(text)})
    assert found == read(FALCON) and found.mamba.largest_step is None


def test_rows_in_our_order() -> None:
    """From z, x, B, C, dt to C, B, x, z, dt; of the convolution, from x, B, C to C, B, x."""
    sizes = DeltaConfig(1, 2, 3, 4, 4, (True,), corrects=False)
    parts = {"z": 8, "x": 8, "B": 3, "C": 3, "dt": 2}
    rows = np.repeat(list(parts), list(parts.values()))[:, None]
    assert "".join(mamba_rows(sizes, rows)[:, 0]) == "CCCBBB" + "x" * 8 + "z" * 8 + "dtdt"
    assert "".join(mamba_channels(sizes, rows[8:22])[:, 0]) == "CCCBBB" + "x" * 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mamba_n_heads": 7}, "mamba_d_ssm 1536 cannot have 7 heads .* of 64 numbers"),
        ({"mamba_n_groups": 5}, "24 heads .* in 5 groups"),
        ({"mamba_d_head": 32}, "24 heads .* of 32 numbers"),
        ({"mamba_d_conv": 1}, "mamba_d_conv is 1, .* >= 2"),
        ({"mamba_d_state": 10**9}, "mamba_d_state is 1000000000, .* <= 4096"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias True is not supported"),
        ({"mamba_use_mlp": False}, "mamba_use_mlp False is not supported"),
        ({"ssm_multipliers": [1.0] * 4}, "ssm_multipliers is .*, it must be 5 positive numbers"),
        ({"mlp_multipliers": [1.0, -1]}, "mlp_multipliers is .*, it must be 2 positive numbers"),
        ({"ssm_multipliers": [10**400, 1, 1, 1, 1]}, "it must be 5 positive numbers"),
        ({"mlp_multipliers": [float("inf"), 1]}, "it must be 2 positive numbers"),
        ({"time_step_limit": 3}, "time_step_limit is 3, it must be a range of numbers"),
        ({"time_step_limit": [5, 1]}, "time_step_limit is .5, 1., it must be a range of numbers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mamba_d_sate": 3}, "unknown key 'mamba_d_sate' = 3 .did you mean 'mamba_d_state'"),
    ],
)
def test_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(QccError, match=words):
        read({**FALCON, **fields})


def test_junk_in_any_key() -> None:
    """A QccError of one line, or a config; nothing else."""
    for key in FALCON:
        for value in (None, True, 0, -1, 3, 2.5, 10**30, float("nan"), "", "x", [], {}, [1], ["x"]):
            try:
                read({**FALCON, key: value})
            except QccError as err:
                assert "\n" not in str(err)
