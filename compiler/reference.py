"""The original in transformers, in fp32: its logits, its hidden states, and both on other weights.

The reference of `qcc eval`. torch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.errors import QccError

Floats = npt.NDArray[np.float32]
NEEDS = "pip install 'qcc[torch]' transformers, or use --reference qcc"


class Transformers:
    """transformers' AutoModelForCausalLM of a checkpoint, on the CPU."""

    def __init__(self, model: Any, name: str) -> None:
        """Use `load`."""
        self.model = model
        self.name = name

    @classmethod
    def load(
        cls,
        folder: Path,
        weights: Mapping[str, Floats] | None = None,
        allow_pickle: bool = False,
    ) -> Transformers:
        """Load a checkpoint.

        Args:
            folder: with config.json and the weights.
            weights: instead of the checkpoint's, under the checkpoint's names, f32.
            allow_pickle: read pytorch_model.bin (weights only).

        Raises:
            QccError: not installed, or transformers refuses the checkpoint.
        """
        torch, transformers = _import()
        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
        try:
            if weights is None:
                options["use_safetensors"] = None if allow_pickle else True
                model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
            else:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                state = {name: torch.from_numpy(array) for name, array in weights.items()}
                with torch.device("meta"):
                    empty = transformers.AutoModelForCausalLM.from_config(config)
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
        return cls(model.eval(), f"transformers {transformers.__version__}, fp32")

    def logits(self, windows: Iterable[Sequence[int]]) -> Iterator[Floats]:
        """The logits f32[n, V] of every position of each window of int[n], one at a time."""
        import torch

        for ids in windows:
            with torch.no_grad():
                out = self.model(torch.tensor([list(ids)]), use_cache=False)
            yield out.logits[0].float().numpy()

    def hidden_states(self, ids: Sequence[int]) -> tuple[list[Floats], Floats]:
        """Of one window int[n]: [embedding, after each layer but the last, after the last norm],
        each f32[n, h]; and its logits f32[n, V]."""
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
        return [x[0].float().numpy() for x in out.hidden_states], out.logits[0].float().numpy()


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
