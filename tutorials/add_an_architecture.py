"""Tutorial 4: add an architecture, in one file, and see whether its numbers are right.

    python -m qcc.tutorials.add_an_architecture        # some seconds; needs torch

An architecture is a module with one object, ARCHITECTURE, in the folder compiler/models. Nothing
else names it: discovery lists the folder, and `qcc list models`, `compile`, `tune`, `eval` and the
random checkpoints know it from then on. `FILE` below is one, of a model that does not exist: Wren,
a Llama whose attention and MLP stand side by side, with names of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qcc.compiler import CompileOptions, compile_model, models
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.decoder import parameters
from qcc.compiler.steps import Steps
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime import LLM, SamplingParams
from qcc.runtime.errors import QccError
from qcc.tutorials.random_checkpoint import make_checkpoint, small_config

NAME = "wren"
FILE = '''\
"""Wren: Llama with attention and MLP side by side, each of its own norm; other names."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, sources
from qcc.compiler.models.attention import Step
from qcc.compiler.models.blocks import scaled
from qcc.compiler.models.decoder import CausalLM, DecoderLayer
from qcc.compiler.models.reading import read_common


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a WrenForCausalLM; read_common refuses what nobody read."""
    reader = ConfigReader(raw, where)
    return read_common(
        reader,
        "wren",
        default_positions=2048,
        residual_scale=reader.number("residual_multiplier", 1.0),
    )


class Layer(DecoderLayer):
    """The parts of Llama's layer; only their order differs."""

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        attended = self.self_attn(self.input_layernorm(x), step)
        made = self.mlp(self.post_attention_layernorm(x))
        return x + scaled(attended + made, self.residual_scale)


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    return CausalLM(config, Layer)


ARCHITECTURE = Architecture(
    model_type="wren",
    hf_names=("WrenForCausalLM",),
    description="Wren (of tutorial 4)",
    config=read_config,
    module=build,
    source=sources(
        renamed={
            "self_attn": "attn",
            "mlp": "ffn",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        }
    ),
)
'''
# Odd sizes show mistakes: heads that share keys, a head_dim that is not hidden_size / heads.
SIZES = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "residual_multiplier": 0.7,
    "initializer_range": 0.08,
}
TOLERANCE = 2e-4  # f32 summed in another order makes 1e-6 to 5e-5; a mistake 1e-2 or more
PROMPT, TOKENS = list(range(3, 123)), 12


def main() -> None:
    """Run the tutorial."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tutorial(Path(folder))


def tutorial(out: Path) -> float:
    """Write, find, compile and check Wren in `out`; returns the largest difference of a logit."""
    # 1. The file: how config.json is read, the module, and which of the checkpoint's tensors make
    # which of its parameters. Everything else is shared blocks. A real one lies in compiler/models.
    print(f"1. {NAME}.py\n\n{FILE}")
    folder = out / "models"
    folder.mkdir()
    (folder / f"{NAME}.py").write_text(FILE, encoding="utf-8")

    print("2. How it is found")
    raw = {"architectures": ["WrenForCausalLM"], "model_type": NAME}
    try:
        models.find_architecture(raw, "config.json")
    except QccError as err:
        print(f"   before: {str(err).partition(';')[0]}")
    with found_in(folder):
        wren = models.find_architecture(raw, "config.json")
        print(f"   after:  {wren.model_type}: {wren.description}")
        return checked(wren, out)


@contextmanager
def found_in(folder: Path) -> Iterator[None]:
    """Let the package qcc.compiler.models have a second folder, for a while."""
    models.__path__.append(str(folder))
    importlib.invalidate_caches()
    models.architectures.cache_clear()
    try:
        yield
    finally:
        models.__path__.remove(str(folder))
        models.architectures.cache_clear()
        sys.modules.pop(f"{models.__name__}.{NAME}", None)


def checked(wren: Architecture, out: Path) -> float:
    """Compile a random Wren and compare it with `reference`."""
    # 3. python -m qcc.tutorials.random_checkpoint --arch wren --set num_hidden_layers=3 ... -o DIR
    # The architecture says itself which tensors it needs; q, k and v become one matrix.
    print("\n3. A checkpoint, and what becomes of its tensors")
    checkpoint = out / "checkpoint"
    config = small_config(NAME, SIZES)
    make_checkpoint(config, checkpoint)
    read = wren.config(config, "config.json")
    for name, shape in parameters(wren.module(read)):
        made_of = [source.name for source in wren.source(read, name, shape).sources]
        if ".layers.0." in name and made_of != [name]:
            print(f"   {name} {list(shape)}\n      of {', '.join(made_of)}")

    # 4. qcc compile DIR --quant q0f32 -o ARTIFACT
    # Floating weights first: what differs now is a mistake, not quantization. Every scheme, method
    # and target takes the architecture from here on; none of them knows its name.
    print("\n4. Compile, compare", flush=True)
    artifact = compile_model(
        str(checkpoint), out / "artifact", CompileOptions(quant="q0f32"), Steps()
    )
    llm = LLM(artifact, precision="high")  # float32 all through, the KV cache as well
    expected = reference(checkpoint, PROMPT)
    most = float(np.abs(llm.logits(PROMPT) - expected).max())
    verdict = "the same" if most < TOLERANCE else "NOT THE SAME"
    print(f"   logits of {len(PROMPT)} tokens, up to {np.abs(expected).max():.1f}: {verdict}")
    print(f"   the largest difference is {most:.1e}, allowed are {TOLERANCE:.0e}")

    # Prefill is one way through the library, decode another.
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    (answer,) = llm.generate([PROMPT], params)
    agreed = answer.token_ids == greedy(checkpoint, TOKENS)
    print(f"   {TOKENS} tokens decoded one by one: {'the same' if agreed else 'NOT THE SAME'}")
    if not agreed:
        most = math.inf

    # 5. A key that nobody reads may change the numbers, so it is an error.
    print("\n5. What is refused")
    try:
        wren.config({**config, "residual_multipler": 0.7}, "config.json")
    except QccError as err:
        print(f"   {err}")

    # 6. To keep it: the file goes to compiler/models, and a Case to tests/architectures/cases.py,
    # where every architecture is checked in the same way, with norms that are not ones, quantized,
    # in batches and chunks. Where transformers has the class it is compared with that; where not,
    # with a module in tests/reference like `reference` below.
    print(f"\n6. To keep it: compiler/models/{NAME}.py, and a Case in tests/architectures/cases.py")
    return most


def greedy(checkpoint: Path, count: int) -> list[int]:
    """The likeliest tokens behind PROMPT, each from all before it."""
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(reference(checkpoint, ids)[-1].argmax()))
    return ids[len(PROMPT) :]


def reference(checkpoint: Path, ids: Sequence[int]) -> Any:
    """f32[n, V]: Wren in plain torch, from its equations and not from the file above."""
    import torch
    from torch.nn import functional as F

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    size, eps = config["head_dim"], 1e-6
    with Checkpoint.open(checkpoint) as file:
        weights = {n: torch.from_numpy(file.read(n).astype(np.float32)) for n in file.names}

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[name]

    def heads(x: Any, name: str) -> Any:
        return F.linear(x, weights[name]).unflatten(-1, (-1, size)).transpose(0, 1)  # [heads, n, d]

    turns = torch.outer(
        torch.arange(len(ids)).float(), 10000.0 ** -(torch.arange(0, size, 2).float() / size)
    )

    def rotate(x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        cos, sin = turns.cos(), turns.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]  # [n, h]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (heads(h, f"{layer}.attn.{part}_proj.weight") for part in "qkv")
        mixed = F.scaled_dot_product_attention(
            rotate(q)[None], rotate(k)[None], v[None], is_causal=True, enable_gqa=True
        )[0]
        attended = F.linear(
            mixed.transpose(0, 1).flatten(1), weights[f"{layer}.attn.o_proj.weight"]
        )
        h = norm(x, f"{layer}.post_attention_layernorm.weight")
        w1, w2, w3 = (weights[f"{layer}.ffn.w{j}.weight"] for j in (1, 2, 3))
        made = F.linear(F.silu(F.linear(h, w1)) * F.linear(h, w3), w2)
        x = x + config["residual_multiplier"] * (attended + made)
    return F.linear(norm(x, "model.norm.weight"), weights["lm_head.weight"]).numpy()


if __name__ == "__main__":
    main()
