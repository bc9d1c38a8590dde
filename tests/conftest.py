"""Fixtures for all tests: tiny random checkpoints, libraries compiled once, transformers' logits.

Everything is made once a session and in temporary folders; the cache folder is one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qcc.runtime.files import cache_dir

# |logits - those of transformers in f32|, at every position, by what the library computes in.
# Both sides sum in f32, in another order: on these models that makes 1e-6 to 5e-5. A mistake in a
# rotation, a mask, a scale or a bias makes 1e-2 or more.
TOLERANCE = {"float32": 2e-4}
# The same library, the same tokens cut another way: only the order of summation differs.
SAME_LIBRARY = 1e-4

# Threads of torch, before anyone imports it: models are tiny and every processor has a process of
# the suite's, so that threads which wait for one another took 15 times the processor's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 361,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 24},
    "qwen2": {**LLAMA, "max_window_layers": 2},
    "qwen3_5_text": {
        **LLAMA,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "partial_rotary_factor": 0.5,
    },
    "falcon_h1": {
        **LLAMA,
        "mamba_d_ssm": 72,
        "mamba_n_heads": 6,
        "mamba_d_state": 28,
        "pad_token_id": 0,
    },
    "gpt_neox": {
        "hidden_size": 96,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "vocab_size": 361,
        "max_position_embeddings": 256,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for the whole suite: one a processor, up to 4, at 1.5 GB each.

    A part of it, named on the command line, runs in pytest's own process.
    """
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(4, len(os.sched_getaffinity(0)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/architectures --target vulkan`: the same checks of another target's kernels."""
    parser.addoption("--target", default="cpu", help="that models are compiled for and run on")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """$QCC_CACHE in a temporary folder: no test sees what another run left.

    The wasm runtime and the Vulkan library alone are taken from there and left there: they take
    two minutes and ten seconds to build, and their names tell all that they were made of.
    """
    folder = tmp_path_factory.mktemp("cache")
    for name in ("wasm", "native"):
        kept = cache_dir() / name
        kept.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tolerance() -> float:
    """The largest difference of logits from transformers' that rounding explains."""
    return TOLERANCE["float32"]


@pytest.fixture(scope="session")
def same_library() -> float:
    """The largest difference of logits between two ways through one library."""
    return SAME_LIBRARY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and texts beside the repository."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"{folder}/models is not there")
    return folder


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled model."""
    from qcc.tutorials.tiny import MODEL_DIR

    if not (MODEL_DIR / "model.safetensors").is_file():
        pytest.skip(f"{MODEL_DIR} holds no model yet")
    return MODEL_DIR


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and <s>, </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")


def randomize(model: Any, seed: int) -> None:
    """Weights for which a mistake shows: logits of order 5, scores of order 2, no norm of ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    buffers = [(name, b) for name, b in model.named_buffers() if name in saved and b.ndim == 1]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            normal = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                gain = 3.0 if any(part in name for part in ("embed", "lm_head")) else 1.5
                tensor.copy_(normal * gain / tensor.shape[-1] ** 0.5)
            elif name.endswith("A_log"):  # heads that forget within 2 tokens, or within 100
                tensor.copy_(normal - 2)
            elif name.endswith("bias"):
                tensor.copy_(0.3 * normal)
            else:
                tensor.copy_(1 + 0.2 * normal)


def _steepen(model: Any, largest: float) -> None:
    """Scale the head where logits are too flat to show mistakes, or so large that f32 makes some.

    Some architectures multiply or divide them, and not all have a norm before the head.
    """
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(3, 67).remainder(vocabulary)[None]
    with torch.no_grad():
        most = float(model(ids, use_cache=False).logits.abs().max())
        if not 4.5 < most < largest:
            model.get_output_embeddings().weight.mul_(6 / most)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(model_type, **fields of config.json): a tiny random f32 one, by transformers.

    The fields change those of SHAPES; `whole=True`: they are all that differs from transformers'.
    With a vision_config it is a model that sees. Logits above `largest` are scaled down.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    made: dict[str, Path] = {}

    def make(arch: str, whole: bool = False, largest: float = 30, **overrides: Any) -> Path:
        key = json.dumps([arch, whole, largest, overrides], sort_keys=True)
        if key not in made:
            shape = {} if whole else SHAPES[arch]
            fields = {"bos_token_id": 1, "eos_token_id": 2, **shape, **overrides}
            config = AutoConfig.for_model(arch, **fields)
            text = config.get_text_config()
            if (text.pad_token_id or 0) >= text.vocab_size:
                text.pad_token_id = None
            kind = (
                AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
            )
            model = kind.from_config(config, dtype=torch.float32)
            randomize(model, seed=0)
            _steepen(model, largest)
            folder = tmp_path_factory.mktemp(arch)
            model.save_pretrained(folder)
            write_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """reference(arch, seed=0, **fields of config.json): a checkpoint that transformers cannot load.

    A `Saved` of tests/reference: `.folder`, and `.logits(ids)`, f32[n, V].
    """
    from .reference.saved import save

    made: dict[str, Any] = {}

    def make(arch: str, **changes: Any) -> Any:
        key = json.dumps([arch, changes], sort_keys=True)
        if key not in made:
            made[key] = save(arch, tmp_path_factory.mktemp(arch), **changes)
            write_tokenizer(made[key].folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[..., Any]:
    """compiled(checkpoint folder, scheme, opt=2, low=False, **SizeFlags): its LLM, `high`.

    One compile for each; `low`: the library has low precision as well, which takes longer. For
    the target that pytest's --target names.
    """
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.sizes import SizeFlags
    from qcc.runtime import LLM
    from qcc.targets.spec import BuildOptions

    made: dict[tuple[Any, ...], Any] = {}
    target = pytestconfig.getoption("--target")

    def compile_once(
        model: Path, quant: str = "q0f32", opt: int = 2, low: bool = False, **sizes: int
    ) -> Any:
        key = (model, quant, opt, low, *sorted(sizes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("artifact") / f"{model.name}-{Path(quant).stem}"
            build = BuildOptions(opt=opt, precision="both" if low else "high")
            options = CompileOptions(
                quant=quant, sizes=SizeFlags(**sizes), build=build, targets=(target,)
            )
            folder = compile_model(str(model), out, options)
            made[key] = LLM(folder, device=target, precision="high")
        return made[key]

    return compile_once


@pytest.fixture(scope="session")
def static_scheme(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scheme file: 8 bits a row, and scales of the layers' inputs from calibration text."""
    path = tmp_path_factory.mktemp("schemes") / "static.yaml"
    lines = ["dtype: float16", *(f"{part}: 8/row" for part in ("linear", "embedding", "lm_head"))]
    path.write_text("\n".join([*lines, "method: mse", "activations: static"]))
    return str(path)


@pytest.fixture(scope="session")
def hugging_face() -> Callable[[Path], Any]:
    """hugging_face(folder): transformers' model in f32 with eager attention; do not change it."""
    import torch
    from transformers import AutoModelForCausalLM

    made: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        if folder not in made:
            made[folder] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return made[folder]

    return load


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Any, list[int]], Any]:
    """logits_of(transformers' model, ids): f32[n, V], every position."""
    import torch

    def run(model: Any, ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    return run


@pytest.fixture(scope="session")
def some_ids() -> Callable[..., list[int]]:
    """some_ids(count, vocabulary): BOS and random tokens, always the same."""

    def ids(count: int, vocabulary: int = 361, seed: int = 0) -> list[int]:
        drawn = np.random.default_rng(seed).integers(3, vocabulary, count - 1)
        return [1, *map(int, drawn)]

    return ids


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of a user's mistake: exit status 2, no traceback."""
        assert self.status == 2, f"exit status {self.status}\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if line.startswith("qcc")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().splitlines()[-1] == lines[0], self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """cli(*words): `qcc WORDS` in this process."""
    from qcc.compiler.cli import main

    def run(*words: object) -> Ran:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Ran(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def environment(cache: Path) -> SimpleNamespace:
    """For subprocesses: the tests' cache, and a folder outside the checkout."""
    return SimpleNamespace(env={**os.environ, "QCC_CACHE": str(cache)}, cwd=cache)
