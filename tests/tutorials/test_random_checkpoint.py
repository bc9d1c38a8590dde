"""The random checkpoints are exactly what Hugging Face expects, small in memory, repeatable."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from qcc.compiler.models import architectures
from qcc.runtime.errors import QccError
from qcc.tutorials import random_checkpoint as rc
from qcc.tutorials.published_shapes import SHAPES

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
VARIANTS = [
    ("llama-3.2-1b", {"num_key_value_heads": 2, "head_dim": 16}),
    (
        "llama-3.2-1b",
        {"num_key_value_heads": 4, "tie_word_embeddings": False}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    ("qwen2.5-0.5b", {"num_key_value_heads": 2}),
    ("mistral-7b", {"num_key_value_heads": 2}),
    ("pythia-160m", {}),
]


def tiny_config(shape: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The named shape, small enough for a test."""
    return rc.shape_config(shape, TINY | overrides)


@pytest.mark.parametrize(("shape", "overrides"), VARIANTS)
def test_loads_in_transformers_with_every_key(
    tmp_path: Path, shape: str, overrides: dict[str, Any]
) -> None:
    """from_pretrained finds all tensors, no others, and computes finite numbers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    total = rc.make_checkpoint(tiny_config(shape, overrides), tmp_path, shard_bytes=100_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert total == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) - sum(
        8 + int.from_bytes(p.read_bytes()[:8], "little") for p in tmp_path.glob("*.safetensors")
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, 512)
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("A dog.")["input_ids"]


@pytest.mark.parametrize("arch", sorted(architectures()))
def test_a_small_model_of_every_architecture(arch: str, tmp_path: Path) -> None:
    """Its own program finds all tensors and no others; each norm makes vectors of length 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = rc.small_config(arch)
    size = rc.make_checkpoint(config, tmp_path)
    assert 8e6 < size < 40e6, "a few million weights of two bytes"
    program = getattr(transformers, config["architectures"][0], None)
    if "text_config" in config:
        program = transformers.AutoModelForCausalLM  # the other cannot do without an eye
    if program is None:
        reference = importlib.import_module(f"..reference.{arch}", __package__)
        wanted = {name: tuple(x.shape) for name, x in reference.tensors(config).items()}
        assert rc.tensor_shapes(config) == wanted
        return
    parts = {"add_pooling_layer": False} if "bert" in arch else {}  # embeddings use no pooler
    model, info = program.from_pretrained(
        tmp_path,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        **parts,
    )
    assert not any(info.values()), info
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert norms
    with torch.no_grad():
        for norm in norms:
            if "Gated" in type(norm).__name__:  # it takes two arguments
                assert (norm.weight == 1).all()
                continue
            normed = norm(torch.randn(1, 1, norm.weight.numel(), generator=torch.manual_seed(0)))
            assert abs(normed.square().mean() - 1) < 0.02, type(norm).__name__
        first = model(torch.arange(8)[None])[0]  # logits, or an encoder's last states
    assert torch.isfinite(first).all() and first.std() > 1e-4


def test_one_file_when_small_and_same_bytes_for_a_seed(tmp_path: Path) -> None:
    """A seed decides every byte; rows of a matrix differ although one block feeds them all."""
    numpy = pytest.importorskip("safetensors.numpy")
    config = tiny_config("qwen2.5-0.5b", {"num_key_value_heads": 2})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rc.make_checkpoint(config, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    tensors = numpy.load_file(tmp_path / "a" / "model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == rc.tensor_shapes(config)
    embedding = tensors["model.embed_tokens.weight"].astype("float32")
    assert len({row.tobytes() for row in embedding}) == 512
    assert 0.015 < embedding.std() < 0.025
    assert (tensors["model.norm.weight"].astype("float32") == 1).all()


def test_named_shapes_have_the_published_sizes() -> None:
    """Parameters (tied tables once) as the models' authors publish them."""

    def millions(shape: str) -> int:
        shapes = rc.tensor_shapes(rc.shape_config(shape)).values()
        return round(sum(map(math.prod, shapes)) / 1e6)

    assert {shape: millions(shape) for shape in SHAPES} == {
        "llama-3.2-1b": 1236,
        "qwen2.5-0.5b": 494,
        "qwen3-0.6b": 596,
        "deepseek-r1-distill-qwen-7b": 7616,
        "mistral-7b": 7242,
        "gemma-2-2b": 2614,
        "minicpm-2b": 2725,
        "phi-3-mini-4k": 3821,
        "smollm3-3b": 3075,
        "gpt-oss-20b": 20915,
        "pythia-160m": 162,
        "bge-base-en-v1.5": 109,
    }


def test_mistakes_are_named() -> None:
    """Unknown shapes and fields, and heads that do not divide."""
    with pytest.raises(QccError, match=r"unknown 'llama-3-1b' \(did you mean 'llama-3.2-1b'\?\)"):
        rc.shape_config("llama-3-1b")
    with pytest.raises(QccError, match=r"no field 'hidden' \(did you mean 'hidden_"):
        rc.shape_config("mistral-7b", {"hidden": 1})
    with pytest.raises(QccError, match=r"--set: .* 12 is not a multiple of num_key_value_heads 8"):
        rc.shape_config("mistral-7b", {"num_attention_heads": 12, "head_dim": 128})
    with pytest.raises(QccError, match=r"unknown 'gemma1' \(did you mean 'gemma"):
        rc.small_config("gemma1")
    with pytest.raises(QccError, match=r"gpt_neox has no field 'hidden'.*; has: .*, vocab_size"):
        rc.small_config("gpt_neox", {"hidden": 1})
    with pytest.raises(QccError, match="'x' is not of the form field=value"):
        rc.parse_overrides(["x"])


@pytest.mark.parametrize("flag", ["--shape=pythia-160m", "--arch=gpt_neox"])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """The command writes config.json with the overrides; a wrong pair of options exits with 2."""
    words = [f"{key}={value}" for key, value in TINY.items()]
    assert rc.main([flag, "--set", *words, "-o", str(tmp_path / "x")]) == 0
    assert f": {flag.partition('=')[2]}, 0.0" in capsys.readouterr().out
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["num_attention_heads"] == 4 and config["model_type"] == "gpt_neox"
    assert (config.get("rotary_pct") == 0.25) == flag.startswith("--shape")
    with pytest.raises(SystemExit) as exit_info:
        rc.main(["--arch", "qwen2", "--shape", "mistral-7b", "-o", str(tmp_path / "y")])
    assert exit_info.value.code == 2
    assert "--shape mistral-7b is of --arch mistral, not qwen2" in capsys.readouterr().err
