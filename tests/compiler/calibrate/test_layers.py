"""The model layer by layer against transformers' whole model in f32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.compiler.calibrate.layers import LayerwiseModel, logits_of_windows
from qcc.compiler.calibrate.states import STEP, Hidden, batches_of
from qcc.runtime.errors import QccError

# Both sides compute in f32, in batches of other sizes: the order of sums differs.
CLOSE = 1e-5
# Attention in torch's own kernel sums in blocks.
CLOSE_LONG = 5e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN["original_max_position_embeddings"] = 64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "window": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "alternating": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "states": ("qwen3_5_text", {}),
    "layers that return tuples": ("falcon_h1", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_layerwise_logits(
    case: str,
    checkpoint: Callable[..., Path],
    hugging_face: Callable[[Path], Any],
    logits_of: Callable[[Any, list[int]], Any],
    some_ids: Callable[..., list[int]],
) -> None:
    """Windows of several lengths, padded in batches: the logits of each as if it were alone."""
    arch, fields = CASES[case]
    folder = checkpoint(arch, **fields)
    windows = [some_ids(count, seed=count) for count in (70, 9, 70, 100, 33, 1)]
    found = list(logits_of_windows(folder, windows, device="cpu"))
    for window, logits in zip(windows, found, strict=True):
        expected = logits_of(hugging_face(folder), window)
        assert logits.dtype == np.float32 and logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("case", ["llama", "window", "alternating", "gpt_neox"])
def test_layerwise_logits_of_long_windows(
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Callable[..., Path],
    hugging_face: Callable[[Path], Any],
    logits_of: Callable[[Any, list[int]], Any],
    some_ids: Callable[..., list[int]],
) -> None:
    """Without eager's scores in memory: masks and windows still hold."""
    monkeypatch.setattr("qcc.compiler.calibrate.layers.LONG", 50)
    arch, fields = CASES[case]
    folder = checkpoint(arch, **fields)
    windows = [some_ids(count, seed=count) for count in (100, 100, 60)]
    for window, logits in zip(
        windows, logits_of_windows(folder, windows, device="cpu"), strict=True
    ):
        expected = logits_of(hugging_face(folder), window)
        np.testing.assert_allclose(logits, expected, atol=CLOSE_LONG, rtol=CLOSE_LONG)


def test_one_layer_in_memory(checkpoint: Callable[..., Path]) -> None:
    """Layers, embedding and head have numbers only within their contexts."""
    model = LayerwiseModel(checkpoint("llama", tie_word_embeddings=False), device="cpu")

    def loaded() -> set[str]:
        named = model.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if parameter.device.type != "meta"}

    assert loaded() == {"model.norm.weight"}
    model.embed([[1, 2, 3]])
    assert loaded() == {"model.norm.weight"}
    with model.layer(1):
        assert loaded() == {"model.norm.weight", *model.names_of_layer(1)}
    with model.head():
        assert loaded() == {"model.norm.weight", "lm_head.weight"}
    assert loaded() == {"model.norm.weight"}


def test_large_states_lie_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Callable[..., Path],
    some_ids: Callable[..., list[int]],
    tmp_path: Path,
) -> None:
    """Above the limit hidden states are a file's, which is gone afterwards; the numbers same."""
    folder, windows = checkpoint("llama"), [some_ids(40), some_ids(20)]
    model = LayerwiseModel(folder, device="cpu")
    small = model.embed(windows)
    monkeypatch.setattr("qcc.compiler.calibrate.states.MEMORY_BYTES", 100)
    large = model.embed(windows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with model.layer(0):
        model.advance(0, small)
        model.advance(0, large)
    for one, other in zip(small.by_window(), large.by_window(), strict=True):
        assert (one == other).all()
    del large, other
    assert not list(tmp_path.iterdir())


def test_batches_hold_each_window_once() -> None:
    """Each fits, is there once, and lengths are multiples of STEP or the longest window's."""
    lengths = [5, 300, 299, 64, 8, 300, 5000, 31, 1]
    batches = batches_of(lengths)
    assert sorted(i for batch in batches for i in batch.windows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.length >= max(lengths[i] for i in batch.windows)
        assert batch.length % STEP == 0 or batch.length == max(lengths)
        assert batch.size <= 4096 or len(batch.windows) == 1
    hidden = Hidden(lengths, 2)
    assert sum(int(hidden.valid(i).sum()) for i in range(len(batches))) == sum(lengths)


def test_damaged_weights_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """NaN in a layer: the error says which."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QccError, match=r"model\.layers\.1 gives NaN or infinite numbers"):
        list(logits_of_windows(folder, [[1, 5, 6, 7]], device="cpu"))


def test_token_beyond_the_vocabulary(checkpoint: Callable[..., Path]) -> None:
    """A tokenizer of another model is named as such, not an index error."""
    with pytest.raises(QccError, match="has token 361, the model 361 tokens"):
        LayerwiseModel(checkpoint("llama"), device="cpu").embed([[1, 361]])


def test_missing_tensor(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A parameter without a tensor is an error, not random numbers."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "missing"
    shutil.copytree(checkpoint("qwen2"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QccError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        LayerwiseModel(folder, device="cpu")
