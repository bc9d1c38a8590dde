"""The original in transformers, in fp32: its logits, its hidden states, and both on other weights.

The reference of `qcc eval`. torch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError
from qcc.runtime.files import read_json

Floats = npt.NDArray[np.float32]
Windows = Sequence[Sequence[int]]
Stream = Callable[[Windows], Iterator[Floats]]
SHARE = 0.6  # of the free memory that weights in f32 may take
NEEDS = "pip install 'qcc[torch]' transformers, or use --reference qcc"


class Transformers:
    """transformers' model of a checkpoint, whole and on the CPU."""

    def __init__(self, model: Any) -> None:
        """Use `load`."""
        self.model = model

    @classmethod
    def load(
        cls,
        folder: Path,
        weights: Mapping[str, Floats] | None = None,
        allow_pickle: bool = False,
    ) -> Transformers:
        """Load a checkpoint as AutoModelForCausalLM does.

        Weights that only qcc reads (packed by another tool, GGUF, pickled) are read by qcc.

        Args:
            folder: with config.json and the weights.
            weights: instead of the checkpoint's, under the checkpoint's names, f32.
            allow_pickle: read pytorch_model.bin (weights only).

        Raises:
            QccError: not installed, or transformers refuses the checkpoint.
        """
        torch, transformers = _import()
        auto = transformers.AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
        try:
            if weights is None and _plain(folder):
                model = auto.from_pretrained(folder, use_safetensors=True, **options)
            elif weights is None:
                from qcc.compiler.calibrate.layers import LayerwiseModel

                with Checkpoint.open(folder, allow_pickle=allow_pickle) as checkpoint:
                    model = LayerwiseModel(folder, checkpoint, "cpu").whole(torch.float32)
            else:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                config.quantization_config = None
                state = {name: torch.from_numpy(array) for name, array in weights.items()}
                with torch.device("meta"):
                    empty = auto.from_config(config)
                # Loading renames what newer versions call otherwise.
                model = type(empty).from_pretrained(
                    None, config=config, state_dict=state, dtype=torch.float32
                )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as err:
            first = next((line for line in str(err).splitlines() if line.strip()), "")
            raise QccError(
                f"{folder}: transformers {transformers.__version__} does not load it "
                f"({type(err).__name__}: {first}); use --reference qcc"
            ) from err
        return cls(model.eval())

    def logits(self, windows: Iterable[Sequence[int]]) -> Iterator[Floats]:
        """The logits f32[n, V] of every position of each window of int[n], one at a time."""
        import torch

        for ids in windows:
            with torch.no_grad():
                out = self.model(torch.tensor([list(ids)]), use_cache=False)
            yield out.logits[0].float().numpy()

    def hidden_states(self, ids: Sequence[int]) -> tuple[list[Floats], Floats]:
        """The residual stream of one window int[n], and its logits f32[n, V].

        The stream is [embedding, after each layer but the last, after the last norm], each f32[n,
        h].
        """
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
        return [x[0].float().numpy() for x in out.hidden_states], out.logits[0].float().numpy()


def reference_logits(folder: Path, allow_pickle: bool = False) -> tuple[str, Stream]:
    """The original's name in a report, and its function windows -> their logits.

    A model that does not fit the memory runs layer by layer, each layer over all windows.

    Raises:
        QccError: not installed, or not a checkpoint that transformers runs.
    """
    _, transformers = _import()
    name = f"transformers {transformers.__version__}, fp32"
    if float_bytes(folder, allow_pickle) < SHARE * _free_bytes():
        return name, Transformers.load(folder, allow_pickle=allow_pickle).logits

    def stream(windows: Windows) -> Iterator[Floats]:
        from qcc.compiler.calibrate.layers import logits_of_windows

        with Checkpoint.open(folder, allow_pickle=allow_pickle) as checkpoint:
            yield from logits_of_windows(folder, windows, checkpoint)

    return f"{name}, layer by layer", stream


def float_bytes(folder: Path, allow_pickle: bool = False) -> int:
    """Bytes of a checkpoint's weights in f32."""
    with Checkpoint.open(folder, allow_pickle=allow_pickle) as checkpoint:
        return 4 * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _plain(folder: Path) -> bool:
    """Whether transformers needs nothing beside itself to read the weights."""
    names = ("model.safetensors", "model.safetensors.index.json")
    packed = "quantization_config" in read_json(folder / "config.json", "give a checkpoint")
    return not packed and any((folder / name).exists() for name in names)


def available() -> bool:
    """Whether torch and transformers are installed."""
    from importlib.util import find_spec

    return find_spec("torch") is not None and find_spec("transformers") is not None


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as err:
        raise QccError(f"the reference needs transformers and torch ({err}); {NEEDS}") from err
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers
