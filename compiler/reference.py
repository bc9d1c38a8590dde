"""The original in transformers, in fp32: its logits, its hidden states, and both on other weights.

The reference of `qcc eval`. torch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.imports.lora import with_lora
from qcc.compiler.imports.mxfp4_file import METHOD as MXFP4
from qcc.compiler.source import checksum, stamp
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError
from qcc.runtime.files import read_json

Floats = npt.NDArray[np.float32]
Windows = Sequence[Sequence[int]]
Stream = Callable[[Windows], Iterator[Floats]]
SHARE = 0.6  # of the free memory that weights in f32 may take
NEEDS = "pip install 'qcc[torch]' transformers, or use --reference qcc"


@dataclass(frozen=True)
class Original:
    """A checkpoint's folder and how it is read: pickled weights, an adapter to merge."""

    folder: Path
    allow_pickle: bool = False
    lora: Path | None = None

    def open(self) -> Checkpoint:
        """Its tensors; a context manager."""
        checkpoint = Checkpoint.open(self.folder, allow_pickle=self.allow_pickle)
        return checkpoint if self.lora is None else with_lora(checkpoint, self.lora)

    def names(self) -> list[str]:
        """Of its tensors."""
        with self.open() as checkpoint:
            return checkpoint.names

    def is_source(self, source: Mapping[str, Any]) -> bool:
        """Whether an artifact whose qcc.json has this `source` was made of it."""
        if source.get("stamp") == stamp(self.folder, self.lora):
            return True
        return bool(source.get("sha256") == checksum(self.folder, self.lora))

    @property
    def float_bytes(self) -> int:
        """Bytes of its weights in f32."""
        with self.open() as checkpoint:
            return 4 * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)

    @property
    def is_plain(self) -> bool:
        """Whether transformers needs nothing beside itself to read the weights."""
        names = ("model.safetensors", "model.safetensors.index.json")
        there = any((self.folder / name).exists() for name in names)
        return there and self._packed in (None, MXFP4) and self.lora is None

    @property
    def is_mxfp4(self) -> bool:
        """Whether transformers must be told to unpack the weights, which it can."""
        return bool(self._packed == MXFP4)

    @property
    def _packed(self) -> Any:
        """The quant_method of config.json, "" where it has none; None: the weights are floats."""
        raw = read_json(self.folder / "config.json", "give a model")
        found = raw.get("quantization_config")
        return found.get("quant_method", "") if isinstance(found, dict) else None


class Transformers:
    """transformers' model of a checkpoint, whole and on the CPU."""

    def __init__(self, model: Any) -> None:
        """Use `load`."""
        self.model = model

    @classmethod
    def load(cls, original: Original, weights: Mapping[str, Floats] | None = None) -> Transformers:
        """Load a checkpoint as AutoModelForCausalLM does.

        Weights that only qcc reads (packed by another tool, GGUF, pickled, with an adapter) are
        read by qcc.

        Args:
            original: the checkpoint.
            weights: instead of the checkpoint's, under the checkpoint's names, f32.

        Raises:
            QccError: not installed, or transformers refuses the checkpoint.
        """
        torch, transformers = import_transformers()
        folder, auto = original.folder, transformers.AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
        try:
            if weights is None and original.is_plain:
                if original.is_mxfp4:
                    unpacked = transformers.Mxfp4Config(dequantize=True)
                    options["quantization_config"] = unpacked
                model = auto.from_pretrained(folder, use_safetensors=True, **options)
            elif weights is None:
                from qcc.compiler.calibrate.layers import LayerwiseModel

                with original.open() as checkpoint:
                    model = LayerwiseModel(folder, checkpoint, "cpu").whole(torch.float32)
            else:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                config.quantization_config = None
                state = {name: torch.from_numpy(array) for name, array in weights.items()}
                with torch.device("meta"):
                    empty = auto.from_config(config)
                # Loading renames what newer versions call otherwise.
                model = type(empty).from_pretrained(
                    None, config=empty.config, state_dict=state, dtype=torch.float32
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


def reference_logits(original: Original) -> tuple[str, Stream]:
    """The original's name in a report, and its function windows -> their logits.

    A model that does not fit the memory runs layer by layer, each layer over all windows.

    Raises:
        QccError: not installed, or not a checkpoint that transformers runs.
    """
    _, transformers = import_transformers()
    name = f"transformers {transformers.__version__}, fp32"
    name += "" if original.lora is None else f", with {original.lora}"
    if original.float_bytes < SHARE * _free_bytes():
        return name, Transformers.load(original).logits

    def stream(windows: Windows) -> Iterator[Floats]:
        from qcc.compiler.calibrate.layers import logits_of_windows

        with original.open() as checkpoint:
            yield from logits_of_windows(original.folder, windows, checkpoint)

    return f"{name}, layer by layer", stream


def available() -> bool:
    """Whether torch and transformers are installed."""
    from importlib.util import find_spec

    return find_spec("torch") is not None and find_spec("transformers") is not None


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def import_transformers() -> tuple[Any, Any]:
    """torch and transformers, which then keeps quiet.

    Raises:
        QccError: one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as err:
        raise QccError(f"the reference needs transformers and torch ({err}); {NEEDS}") from err
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers
