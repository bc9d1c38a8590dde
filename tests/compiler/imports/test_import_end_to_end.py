"""qcc compile of what other tools made: logits and texts of transformers on dequantized weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from qcc.runtime import LLM, SamplingParams

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def reference(source: Path, numbers: dict[str, Any]) -> Any:
    """Transformers' model of a folder with other weights, in f32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = {name: torch.tensor(np.asarray(x, np.float32)) for name, x in numbers.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}  # tied
    return model.eval()


def check_same(llm: LLM, model: Any, ids: list[int], tolerance: float) -> None:
    """Logits of a prompt, and a greedy text."""
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        text = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
    assert np.abs(llm.logits(ids) - expected).max() < tolerance
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert list(llm.generate([ids], params)[0].token_ids) == text


def test_a_gguf_file_alone(
    checkpoint: Callable[..., Path],
    write_gguf: Callable[..., dict[str, Any]],
    cli: Any,
    some_ids: Any,
    tolerance: float,
    tmp_path: Path,
) -> None:
    """Q4_K_M's mix, with floating and 8-bit matrices: nothing is given but the file."""

    def kind(name: str, tensor: Any) -> str:
        kinds = {"v_proj": "Q6_K", "embed": "Q6_K", "up_proj": "F16", "down_proj": "Q5_0"}
        return next((kinds[part] for part in kinds if part in name), "Q4_K")

    source = checkpoint("llama", **WIDE)
    numbers = write_gguf(source, tmp_path / "m.gguf", kind, file_type=15)
    out = tmp_path / "out"
    ran = cli("compile", tmp_path / "m.gguf", "-o", out)
    assert ran.status == 0, ran.err
    assert "codes kept: tensors 4 Q4_K as [4 bits, group 32, asymmetric" in ran.out + ran.err
    assert "requantized" not in ran.out + ran.err
    manifest = json.loads((out / "qcc.json").read_text(encoding="utf-8"))
    assert manifest["scheme"] == "gguf-q4_k_m"
    check_same(LLM(out, precision="high"), reference(source, numbers), some_ids(40), tolerance)


def gptq_layer(weight: Any, group: int) -> tuple[dict[str, Any], Any]:
    """Symmetric 4-bit GPTQ of a weight [n, k] by rounding: tensors by part, and its numbers."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, group)
    scales = (np.abs(groups).max(axis=2) / 7).astype(np.float16)  # [n, G]
    wide = np.repeat(scales.astype(np.float32), group, axis=1)
    codes = np.clip(np.rint(weight / wide) + 8, 0, 15).astype(np.uint32)
    words = np.zeros((k // 8, n), np.uint32)
    for i in range(8):
        words |= codes.T[i::8] << np.uint32(4 * i)
    parts = {
        "qweight": words.view(np.int32),
        "qzeros": np.full((k // group, n // 8), 0x77777777, np.int32),  # 8 - 1
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(k) // group).astype(np.int32),
        "bias": np.zeros(n, np.float16),
    }
    return parts, (codes.astype(np.float32) - 8) * wide


def write_gptq(source: Path, folder: Path) -> dict[str, Any]:
    """Fill `folder` with `source`, its projections in 4 bits; the numbers that they stand for."""
    shutil.copytree(source, folder)
    tensors, numbers = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, numbers[name] = gptq_layer(weight, 64)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": value for part, value in parts.items()}
        else:
            tensors[name] = weight.astype(np.float16)
            numbers[name] = tensors[name].astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return numbers


def test_a_gptq_mixture_of_experts(
    checkpoint: Callable[..., Path], cli: Any, some_ids: Any, tolerance: float, tmp_path: Path
) -> None:
    """Codes of experts are kept, expert below expert; the router is floating."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "vocab_size": 361}
    fields = {**experts, **heads, **sizes, "tie_word_embeddings": False}
    source, out = checkpoint("qwen3_moe", whole=True, **fields), tmp_path / "out"
    numbers = write_gptq(source, tmp_path / "gptq")
    ran = cli("compile", tmp_path / "gptq", "-o", out, "--context-window", 256)
    assert ran.status == 0, ran.err
    assert "codes kept: tensors 13 GPTQ 4 bits" in ran.out + ran.err
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    check_same(LLM(out, precision="high"), model, some_ids(40), tolerance)


def test_a_gptq_checkpoint_with_an_adapter(
    checkpoint: Callable[..., Path], cli: Any, some_ids: Any, tolerance: float, tmp_path: Path
) -> None:
    """Kept codes are exact; the one layer that an adapter changes is stored as asked, here f32."""
    source, folder, adapter = checkpoint("llama", **WIDE), tmp_path / "gptq", tmp_path / "adapter"
    numbers, rng = write_gptq(source, folder), np.random.default_rng(0)
    name = "model.layers.0.mlp.down_proj"
    a, b = (rng.normal(size=s).astype(np.float32) / 16 for s in ((2, 256), (256, 2)))
    adapter.mkdir()
    prefix = f"base_model.model.{name}"
    lora = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(lora, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    numbers[f"{name}.weight"] = numbers[f"{name}.weight"] + 2 * (b @ a)

    out = tmp_path / "out"
    words = ("compile", folder, "-o", out, "--lora", adapter, "--opt", "O0")
    ran = cli(*words, "--set", "*.down_proj.weight=q0f32")
    assert ran.status == 0, ran.err
    assert "codes kept: tensors 6 GPTQ 4 bits as [4 bits, group 64" in ran.out + ran.err
    check_same(LLM(out, precision="high"), reference(source, numbers), some_ids(40), tolerance)
