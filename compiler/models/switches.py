"""Which keys of config.json an architecture understands: found by trying, so never out of date.

A switch is a key besides the sizes whose value changes what the model computes. What a file reads
only to refuse or to ignore is none.
"""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import KEYS_READ, ModelConfig
from qcc.compiler.models.architecture import Architecture
from qcc.runtime.errors import QccError

# A config.json of sizes alone, and one with what makes a window count where it is a choice.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 4}
# Numbers of every architecture that say no more than the sizes do.
PLAIN = ("head_dim", "eps", "epsilon", "rope_theta", "rope_parameters")
VALUES: tuple[Any, ...] = (
    *(True, False, None, 0, 1, 3, 24, 0.25, 7.0),
    *("gelu", "relu", "silu", "gelu_pytorch_tanh"),
    *([0, 1] * 4, [1, 0] * 4, ["sliding_attention", "full_attention"] * 4),
    ["linear_attention", "full_attention"] * 4,
    {"rope_type": "linear", "factor": 2.0},
)


def switches(architecture: Architecture) -> list[str]:
    """The keys, sorted."""
    heard: set[str] = set()
    token = KEYS_READ.set(heard)
    try:
        architecture.config(dict(SIZES), "config.json")
    finally:
        KEYS_READ.reset(token)
    found: set[str] = set()
    window = {key: value for key, value in WINDOW.items() if key in heard}
    for context in (SIZES, {**SIZES, **window}):
        usual = _read(architecture, context)
        for key in heard - found - set(SIZES):
            if key.endswith(PLAIN) or key.startswith("_") or usual is None:
                continue
            if _differs(architecture, context, key, usual):
                found.add(key)
    return sorted(found)


def _differs(
    architecture: Architecture, context: dict[str, Any], key: str, usual: ModelConfig
) -> bool:
    """Whether some value of `key` beside `context` means another model than none."""
    read = (_read(architecture, {**context, key: value}) for value in VALUES)
    return any(found not in (None, usual) for found in read)


def _read(architecture: Architecture, raw: dict[str, Any]) -> ModelConfig | None:
    """What a config.json means; None: it is refused."""
    try:
        return architecture.config(dict(raw), "config.json")
    except QccError:
        return None
