"""Architecture: what an architecture's file defines, and how weights map to source tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from qcc.compiler.config import ModelConfig
from qcc.compiler.weights.spec import SourceTensor, Transform

if TYPE_CHECKING:
    from qcc.compiler.models.decoder import CausalLM
    from qcc.compiler.models.encoder import Encoder


@dataclass(frozen=True)
class WeightSource:
    """How a parameter of a module is made: source tensors stacked along rows, then a transform.

    `whole`: the sources cannot be stored apart, in formats of their own.
    """

    sources: tuple[SourceTensor, ...]
    transform: Transform | None = None
    whole: bool = False


Source = Callable[[ModelConfig, str, tuple[int, ...]], WeightSource]


@dataclass(frozen=True)
class Architecture:
    """One architecture: `config` reads config.json, `module` builds the float model.

    `source` says from which tensors of the checkpoint a parameter of the module is made;
    `embedding` and `lm_head` name the parameters that schemes treat apart; `ignored` are wildcards
    of source tensors that hold nothing of the model, `floating` of matrices that no scheme
    quantizes.
    """

    model_type: str
    hf_names: tuple[str, ...]
    description: str
    config: Callable[[dict[str, Any], str], ModelConfig]
    module: Callable[[ModelConfig], CausalLM | Encoder]
    source: Source
    embedding: str = "model.embed_tokens.weight"
    lm_head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()

    def role(self, name: str, shape: tuple[int, ...]) -> str:
        """What a scheme asks of a parameter: embedding, lm_head, linear or float."""
        if len(shape) != 2 or any(fnmatchcase(name, each) for each in self.floating):
            return "float"
        return {self.embedding: "embedding", self.lm_head: "lm_head"}.get(name, "linear")


def unchanged(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """A parameter that the checkpoint has under the same name, in the same order."""
    return WeightSource((SourceTensor(name, shape),))


def stacked(
    config: ModelConfig, name: str, shape: tuple[int, ...], fused: dict[str, tuple[str, ...]]
) -> WeightSource:
    """The sources of parameter `name`: itself, or the parts that `fused` names for its layer.

    Attention parts have the heads' rows (q, then k and v); other parts share the rows evenly.
    """
    layer, _, kind = name.rpartition(".")
    parent, _, leaf = layer.rpartition(".")
    if leaf not in fused:
        return unchanged(config, name, shape)
    parts = fused[leaf]
    if len(parts) == 3:
        kv_rows = config.num_key_value_heads * config.head_dim
        rows: tuple[int, ...] = (config.num_attention_heads * config.head_dim, kv_rows, kv_rows)
    else:
        rows = (shape[0] // len(parts),) * len(parts)
    return WeightSource(
        tuple(
            SourceTensor(f"{parent}.{part}.{kind}", (n, *shape[1:]))
            for part, n in zip(parts, rows, strict=True)
        )
    )


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def sources(
    fused: Mapping[str, tuple[str, ...]] = FUSED,
    renamed: Mapping[str, str] | None = None,
    interleaved: bool = False,
    transposed: bool = False,
) -> Source:
    """The map from our parameters to the checkpoint's tensors, made of the usual differences.

    Args:
        fused: our name of a fused layer -> the names of its parts.
        renamed: a part of our names, whole words between dots -> the checkpoint's.
        interleaved: the checkpoint rotates pairs (2 i, 2 i + 1); the rows of q and k are sorted to
            our pairs (i, i + rotary_dim / 2), which leaves every score as it is.
        transposed: the matrices of layers lie [in, out].
    """

    def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
        found = stacked(config, name, shape, dict(fused))
        if interleaved and ".qkv_proj." in name:
            found = replace(found, transform=lambda rows: halves_of_pairs(config, rows))
        if transposed and ".layers." in name and len(shape) == 2:
            found = WeightSource((SourceTensor(name, shape[::-1]),), lambda matrix: matrix.T)
        return WeightSource(
            tuple(replace(s, name=_renamed(s.name, renamed or {})) for s in found.sources),
            found.transform,
        )

    return source


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    dotted = f".{name}."
    for ours, theirs in renamed.items():
        dotted = dotted.replace(f".{ours}.", f".{theirs}.")
    return dotted[1:-1]


def halves_of_pairs(config: ModelConfig, rows: Any) -> Any:
    """Fused rows of q, k, v [heads * d, ...] -> the same, rotated pairs of q and k split in halves.

    Within the first rotary_dim rows of a head the even ones come first, then the odd ones.
    """
    heads, dim, turned = config.num_key_value_heads, config.head_dim, config.rope.rotary_dim
    count = (config.num_attention_heads + heads) * dim
    each = rows[:count].reshape(-1, dim, *rows.shape[1:])
    parts = [each[:, 0:turned:2], each[:, 1:turned:2], each[:, turned:]]
    sorted_rows = np.concatenate(parts, axis=1).reshape(count, *rows.shape[1:])
    return np.concatenate([sorted_rows, rows[count:]])
