"""SwappableModel: a checkpoint compiled with floating weights, any of which can be replaced.

What a weight's rounding alone does to the logits is measured with it: by the per-tensor report of
`qcc eval` and by `qcc tune`. Not a verb.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.build import weight_specs
from qcc.compiler.driver import compile_model
from qcc.compiler.options import CompileOptions
from qcc.compiler.reference import SHARE, Original
from qcc.compiler.source import locate, stamp
from qcc.compiler.steps import Steps
from qcc.compiler.stored_weights import plan_of
from qcc.runtime.artifact import Artifact
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir
from qcc.runtime.machine import available_bytes
from qcc.targets.spec import BuildOptions

if TYPE_CHECKING:
    from qcc.runtime.engine.llm import LLM

Floats = npt.NDArray[np.float32]
FLOAT, LARGE = "q0f32", "q0bf16"


class SwappableModel:
    """The float library of a checkpoint, loaded; `name` is its scheme.

    Weights are named as the model's parameters (`...self_attn.qkv_proj.weight`, rows in the
    library's order) or, of a fused one, as a source of it (`...self_attn.q_proj.weight`).
    """

    def __init__(
        self,
        model: str | Path,
        steps: Steps | None = None,
        quant: str | None = None,
        context_window: int | None = None,
        allow_pickle: bool = False,
        lora: Path | None = None,
    ) -> None:
        """Compile the checkpoint into the cache, unless it is there, and load it.

        Args:
            model: checkpoint folder or hub id.
            steps: is told what is under way; None: nobody.
            quant: a floating scheme; None: q0f32, or q0bf16 where f32 does not fit the memory.
            context_window: tokens of the longest `logits`; None: the library's.
            allow_pickle: read pytorch_model.bin.
            lora: an adapter to merge.
        """
        from qcc.runtime.engine.llm import LLM

        original = Original(locate(str(model), allow_pickle), allow_pickle, lora)
        small = original.float_bytes < SHARE * available_bytes()
        self.name = quant or (FLOAT if small else LARGE)
        folder = compiled_float(original, self.name, steps)
        artifact = Artifact.open(folder)
        if artifact.manifest.sizes["context_window_size"] < 0:
            context_window = None  # a sliding window has no bound
        self.llm: LLM = LLM(
            folder, context_window=context_window, max_batch_size=1, precision="high"
        )
        specs = weight_specs(plan_of(artifact, original))
        self.shapes = {spec.name: spec.shape for spec in specs}
        self._rows: dict[str, tuple[str, slice]] = {}  # any name -> (parameter, its rows)
        for spec in specs:
            self._rows[spec.name] = spec.name, slice(0, spec.shape[0])
            start = 0
            for part in spec.sources if len(spec.sources) > 1 else ():
                self._rows[part.name] = spec.name, slice(start, start + part.shape[0])
                start += part.shape[0]
        self._original = list(self.llm.model.slots)
        self._slots = list(self._original)
        self._replaced: dict[str, set[str]] = {}  # parameter -> names under which it is replaced
        self._current: dict[str, npt.NDArray[Any]] = {}  # its numbers then

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that `replace` takes."""
        return tuple(self._rows)

    def logits(self, ids: Sequence[int]) -> Floats:
        """f32[n, V] of every position of int[n], with the weights as they are now."""
        return self.llm.logits(ids)

    def replace(self, name: str, weights: Floats) -> None:
        """Compute with other numbers, f32[n, k], from now on; earlier replacements stay.

        Raises:
            QccError: no such weight, or numbers of another shape.
        """
        parameter, rows = self._find(name)
        shape = (rows.stop - rows.start, *self.shapes[parameter][1:])
        if tuple(weights.shape) != shape:
            raise QccError(f"{name}: given {list(weights.shape)}, the model has {list(shape)}")
        if parameter not in self._current:
            self._current[parameter] = np.array(self.llm.artifact.read(parameter))
        current = self._current[parameter]
        current[rows] = weights.astype(current.dtype)
        self._replaced.setdefault(parameter, set()).add(name)
        self._swap(parameter)

    def restore(self, name: str) -> None:
        """Compute with the original numbers again, the very same tensors.

        Raises:
            QccError: no such weight.
        """
        parameter, rows = self._find(name)
        if parameter not in self._replaced:
            return
        names = self._replaced[parameter]
        names.discard(name)
        if name == parameter:
            names.clear()
        if names:
            self._current[parameter][rows] = self.llm.artifact.read(parameter)[rows]
            self._swap(parameter)
            return
        del self._replaced[parameter], self._current[parameter]
        for index in self._slots_of(parameter):
            self._slots[index] = self._original[index]
        self.llm.model.library.bind(self._slots)

    def _find(self, name: str) -> tuple[str, slice]:
        if name not in self._rows:
            raise QccError(f"{self.llm.artifact.folder}: the model has no weight {name!r}")
        return self._rows[name]

    def _slots_of(self, parameter: str) -> list[int]:
        """Slots made of a parameter; a tied embedding has two."""
        slots = self.llm.model.library.metadata.slots
        return [index for index, slot in enumerate(slots) if parameter in slot.stored]

    def _swap(self, parameter: str) -> None:
        """Put the current numbers of a parameter into its slots, repacked as at load."""
        from qcc.runtime.engine.weights import slot_of

        library = self.llm.model.library
        for index in self._slots_of(parameter):
            self._slots[index] = slot_of(
                library, library.metadata.slots[index], self._current.__getitem__
            )
        library.bind(self._slots)


def compiled_float(original: Original, quant: str, steps: Steps | None = None) -> Path:
    """The artifact of a checkpoint under a floating scheme, in the cache; compiled once."""
    source = original.folder.resolve()
    key = hashlib.sha256(repr((str(source), original.lora)).encode()).hexdigest()[:16]
    out = cache_dir() / "compiled" / f"{source.name}-{quant}-{key}"
    try:
        if Artifact.open(out).manifest.source.get("stamp") == stamp(source, original.lora):
            return out
    except QccError:
        pass  # not there, unfinished, or of another version
    options = CompileOptions(
        quant=quant,
        build=BuildOptions(precision="high"),  # all that a reference is asked for
        force=True,
        allow_pickle=original.allow_pickle,
        lora=original.lora,
    )
    return compile_model(str(source), out, options, steps)
