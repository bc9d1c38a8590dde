"""qcc.compiler.models: one file an architecture, over shared blocks.

  rope.py          rotary position embeddings
  reading.py       the fields of config.json that architectures share
  blocks.py        linear, embedding, norms, MLPs
  attention.py     attention over the paged KV cache
  experts.py       mixture of experts
  latent_attention.py  multi-head latent attention
  delta_rule.py, gated_delta.py, delta_reading.py, mamba.py, recurrent.py  layers with states
  decoder.py       layers, the decoder, the functions that clients call
  texts.py         texts end to end in place of a cache, for embedding models
  encoder.py       layers and model of encoders
  architecture.py  Architecture: what an architecture's file defines
  switches.py      which keys of config.json an architecture understands
  <arch>.py        its config mapping, its module, its weight map

An architecture's file defines one object, ARCHITECTURE; discovery lists this folder for them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from qcc.compiler.config import shown
from qcc.quant_schemes.errors import did_you_mean
from qcc.runtime.errors import QccError

if TYPE_CHECKING:
    from qcc.compiler.models.architecture import Architecture


@cache
def architectures() -> dict[str, Architecture]:
    """All architectures by model_type."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        architecture = getattr(module, "ARCHITECTURE", None)
        if architecture is not None:  # else the file holds parts that architectures share
            found[architecture.model_type] = architecture
    return found


def find_architecture(raw: dict[str, Any], where: str) -> Architecture:
    """The architecture that a config.json names by `architectures` (first) or `model_type`."""
    known = architectures()
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise QccError(
            f"{where}: architectures is {shown(names)}, it must be a list of class names"
        )
    for architecture in known.values():
        if any(_with_head(name) in architecture.hf_names for name in names):
            return architecture
    model_type = raw.get("model_type")
    model_type = model_type if isinstance(model_type, str) else shown(model_type)
    if not names and model_type in known:
        return known[model_type]
    asked = names[0] if names else model_type
    classes = [name for architecture in known.values() for name in architecture.hf_names]
    raise QccError(
        f"{where}: architecture {shown(asked)} is not supported{did_you_mean(asked, classes)}; "
        f"supported: {', '.join(classes)} (qcc list models)"
    )


def is_headless(raw: dict[str, Any]) -> bool:
    """Whether a config.json names the class of a decoder without its lm_head, as MistralModel."""
    names = raw.get("architectures") or []
    return bool(names) and all(_with_head(name) != name for name in names)


def _with_head(name: str) -> str:
    """MistralModel -> MistralForCausalLM; any other name as it is."""
    if not name.endswith("Model"):
        return name
    stem = name.removesuffix("Model").removesuffix("Text")
    known = {each for found in architectures().values() for each in found.hf_names}
    headed = (f"{stem}ForCausalLM", f"{stem}LMHeadModel")
    return next((each for each in headed if each in known), name)
