"""PEFT adapters merged while reading, against torch's W + scale * B A."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qcc.compiler.imports.lora import with_lora
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBED, NORM = "model.embed_tokens", "model.norm"
BASE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(tensors by layer and part, ...): an adapter folder."""

    def write(tensors: dict[str, Any], **config: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors")
        text = json.dumps({**BASE, **config})
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        return folder

    return write


def factors(n: int, k: int, rank: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A [r, k] and B [n, r]."""
    generator = torch.Generator().manual_seed(n * k)
    a = torch.randn(rank, k, generator=generator).to(dtype)
    return a, torch.randn(n, rank, generator=generator).to(dtype)


def pair(layer: str, a: Any, b: Any) -> dict[str, Any]:
    """As PEFT saves them."""
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / 4**0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 6}}, 6 / 4),
        ({"alpha_pattern": {"k_proj": 6}, "fan_in_fan_out": True}, 8 / 4),
    ],
)
def test_a_linear_layer_is_merged(
    options: dict[str, Any], scale: float, checkpoint: Callable[..., Path], save: Save
) -> None:
    """Whole and by ranges of rows; all other tensors are the base's own."""
    source = checkpoint("llama")
    weights = load_file(source / "model.safetensors")
    (a, b), (c, d) = factors(64, 64), factors(64, 172, dtype=torch.bfloat16)
    folder = save({**pair(Q, a, b), **pair(DOWN, c, d)}, **options)
    with Checkpoint.open(source) as base, with_lora(base, folder) as merged:
        assert merged.names == base.names
        for name, one, other, factor in ((Q, a, b, scale), (DOWN, c, d, 2.0)):
            if name == DOWN and options.get("use_rslora"):
                factor = scale
            weight = weights[f"{name}.weight"].double()
            expected = (weight + factor * (other.double() @ one.double())).numpy()
            read = merged.read(f"{name}.weight")
            assert read.dtype == np.float32
            np.testing.assert_allclose(read, expected, rtol=2e-6, atol=2e-6)
            k = expected.shape[1]
            rows = merged.read_flat(f"{name}.weight", 5 * k + 3, 9 * k).astype(np.float64)
            np.testing.assert_allclose(rows, expected.reshape(-1)[5 * k + 3 : 9 * k], atol=2e-6)
        for name in base.names:
            if name not in (f"{Q}.weight", f"{DOWN}.weight"):
                assert (merged.read(name) == base.read(name)).all()


def test_rank_pattern_and_embedding(checkpoint: Callable[..., Path], save: Save) -> None:
    """A rank of its own, and the transposed product of an embedding."""
    source = checkpoint("llama", tie_word_embeddings=False)
    weights = load_file(source / "model.safetensors")
    (a, b), (c, d) = factors(64, 64, rank=2), factors(64, 361)
    embedding = {f"{EMBED}.lora_embedding_A": c, f"{EMBED}.lora_embedding_B": d}
    folder = save({**pair(Q, a, b), **embedding}, rank_pattern={"q_proj": 2})
    with with_lora(Checkpoint.open(source), folder) as merged:
        expected = weights[f"{Q}.weight"] + 8 / 2 * (b @ a)
        np.testing.assert_allclose(merged.read(f"{Q}.weight"), expected.numpy(), atol=2e-6)
        expected = weights[f"{EMBED}.weight"] + 8 / 4 * (d @ c).T
        np.testing.assert_allclose(merged.read(f"{EMBED}.weight"), expected.numpy(), atol=5e-6)


def test_modules_to_save_replace(checkpoint: Callable[..., Path], save: Save) -> None:
    """Whole tensors, vectors too."""
    source = checkpoint("llama", tie_word_embeddings=False)
    head, norm = torch.randn(361, 64), torch.randn(64).to(torch.float16)
    folder = save({"lm_head.weight": head, f"{NORM}.weight": norm}, modules_to_save=["lm_head"])
    with with_lora(Checkpoint.open(source), folder) as merged:
        assert (merged.read("lm_head.weight") == head.numpy()).all()
        assert (merged.read(f"{NORM}.weight") == norm.float().numpy()).all()
        assert (merged.read_flat("lm_head.weight", 70, 90) == head.reshape(-1)[70:90].numpy()).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA is supported"),
        ({"use_dora": True}, "use_dora = True is not supported; it may change the numbers"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication = \[\[0, 2\]\] is not supported"),
        ({"new_option": 3}, "new_option = 3 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base's own"),
        ({"r": 8}, r"matrices \[4, 64\] and \[64, 4\], adapter_config.json says rank 8"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_options_that_change_the_numbers_are_refused(
    config: dict[str, Any], message: str, checkpoint: Callable[..., Path], save: Save
) -> None:
    """Each by its name."""
    folder = save(pair(Q, *factors(64, 64)), **config)
    with Checkpoint.open(checkpoint("llama")) as base, pytest.raises(QccError, match=message):
        with_lora(base, folder)


BIG, SMALL = factors(128, 64), factors(64, 64)
BAD: list[tuple[dict[str, Any], str]] = [
    (pair(Q, *BIG), r"changes a weight \[128, 64\], but .* has \[64, 64\]; .* another base"),
    (pair(Q.replace("0", "7"), *SMALL), r"layers.7.self_attn.q_proj.weight', which .* not have"),
    ({f"{Q}.lora_A.weight": SMALL[0]}, "has lora_A, needs the matrices lora_A and lora_B"),
    (
        {**pair(Q, *SMALL), f"{Q}.lora_magnitude_vector": torch.ones(64)},
        "lora_magnitude_vector' is not supported",
    ),
    ({f"{NORM}.weight": torch.ones(65)}, r"for 'model.norm.weight' it is \[65\], but"),
    ({f"{EMBED}.weight": torch.ones(361, 64)}, "which is the lm_head as well"),
    ({f"{Q}.weight": torch.ones(64, 64, dtype=torch.int32)}, "has dtype I32"),
    ({}, "it holds no tensors"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_an_adapter_of_another_base_is_refused(
    case: int, checkpoint: Callable[..., Path], save: Save
) -> None:
    """Shapes and names that do not fit."""
    tensors, message = BAD[case]
    folder = save(tensors)
    with Checkpoint.open(checkpoint("llama")) as base, pytest.raises(QccError, match=message):
        with_lora(base, folder)


def test_a_folder_without_an_adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It is named."""
    with (
        Checkpoint.open(checkpoint("llama")) as base,
        pytest.raises(QccError, match=r"it has no adapter_model\.safetensors"),
    ):
        with_lora(base, tmp_path)


def test_what_peft_merges(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter that PEFT made and saved, against its own merge, where it is installed."""
    peft = pytest.importorskip("peft", reason="compares with PEFT where it is installed")
    from transformers import AutoModelForCausalLM

    source = checkpoint("llama", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        rank_pattern={"down_proj": 3},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = adapted.merge_and_unload().state_dict()
    with with_lora(Checkpoint.open(source), tmp_path / "adapter") as merged:
        for name in merged.names:
            np.testing.assert_allclose(merged.read(name), expected[name].numpy(), atol=2e-5)
