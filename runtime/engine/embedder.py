"""Embedder: an artifact folder that makes a vector of each text.

embedder = Embedder("qwen3-embedding-q8")
vectors = embedder.embed(["How tall is the Eiffel Tower?", "It has 330 metres."])
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from qcc.runtime.artifact import CHAT_CONFIG, Artifact
from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.device import library_name, open_device
from qcc.runtime.engine.library import Floats, Library
from qcc.runtime.engine.memory import check_embedding
from qcc.runtime.engine.settings import choose_precision, settings
from qcc.runtime.engine.tokenizer import Tokenizer
from qcc.runtime.engine.weight_memory import check_weights
from qcc.runtime.engine.weights import load_slots
from qcc.runtime.errors import QccError
from qcc.runtime.manifest import RECOMPILE

LEAST_LENGTH = 1e-12  # of a vector that is made one of length 1


@dataclass(frozen=True)
class Usage:
    """What mlc-chat-config.json says of texts under `embedding`: their prompts, their case."""

    prompts: dict[str, str]
    default_prompt: str | None
    lower_case: bool

    @classmethod
    def of(cls, artifact: Artifact) -> Usage:
        """Read it.

        Raises:
            QccError: the artifact is of a model that writes text, or the file is damaged.
        """
        if artifact.manifest.task != "embedding":
            raise QccError(
                f"{artifact.folder}: not an embedding model; use qcc generate, or compile it with "
                "--task embedding"
            )
        found: Any = artifact.chat_config.get("embedding")
        try:
            default = found["default_prompt"]
            return cls(
                {str(name): str(text) for name, text in found["prompts"].items()},
                None if default is None else str(default),
                bool(found["lower_case"]),
            )
        except (AttributeError, KeyError, TypeError) as err:
            raise QccError(
                f"{artifact.folder / CHAT_CONFIG}: embedding is not usable; {RECOMPILE}"
            ) from err

    def prompt(self, name: str | None) -> str:
        """What goes before a text; None: the model's default, if it has one.

        Raises:
            QccError: there is no prompt of that name.
        """
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "no prompts"
            raise QccError(f"prompt {name!r}: the model has {known}")
        return self.prompts[name]


class Embedder:
    """A loaded embedding model. Not for several threads at a time."""

    def __init__(
        self,
        artifact_dir: Path | str,
        device: str = "cpu",
        threads: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        precision: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Open the artifact and load its library for `device`.

        Args:
            artifact_dir: what `qcc compile` wrote.
            device: a target, or the name of one library, as cpu-x86-64-v3.
            threads: of the CPU; None: $TVM_NUM_THREADS, else the physical cores.
            progress: is told (what, bytes done, bytes in all) of long steps.
            precision: high (float32 activations) or low (int8); None: low.
            weights: ram (memory of this process) or mmap (shared pages of the files); None: ram.

        Raises:
            QccError: a damaged artifact, one of another kind of model, too little memory.
        """

        def report(what: str) -> Callable[..., None] | None:
            return None if progress is None else lambda done, total, *_: progress(what, done, total)

        self.artifact = Artifact.open(artifact_dir)
        self.usage = Usage.of(self.artifact)
        self.threads = tvm_runtime.set_threads(threads)
        self.artifact.verify(report("check"))
        machine = open_device(device)
        path = self.artifact.library(library_name(device))
        machine.check_library(self.artifact, path)
        self.library = Library(path, machine)
        meta = self.library.metadata
        chosen = choose_precision(precision, meta.precision)
        check_embedding(meta, machine.memory)
        where, told = check_weights(weights), report("load weights")
        slots = load_slots(self.artifact, self.library, told, settings(chosen), where)
        self.library.bind(slots)
        self.tokenizer = Tokenizer(self.artifact.folder, self.artifact.chat_config)
        self.window = meta.context_window_size
        self.dimensions = meta.hidden_size

    def embed(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        truncate: bool = True,
        dimensions: int | None = None,
    ) -> Floats:
        """A vector of each text, f32[b, dimensions].

        Args:
            texts: one or more; in one pass as many as the library's sizes allow.
            prompt_name: of the model's prompts, to go before each text; None: its default.
            truncate: cut a text of more tokens than the window, with a warning.
            dimensions: the first N numbers of each vector, made one of length 1 again: good for
                models that were trained for it; None: all.

        Raises:
            QccError: no such prompt, more dimensions than there are, an empty or too long text.
        """
        many = [texts] if isinstance(texts, str) else list(texts)
        if dimensions is not None and not 1 <= dimensions <= self.dimensions:
            raise QccError(f"dimensions {dimensions}: the model has 1 to {self.dimensions}")
        vectors = self.encode(self.tokenize(many, prompt_name, truncate))
        return vectors if dimensions is None else unit(vectors[:, :dimensions])

    def encode(self, tokens: Sequence[Sequence[int]]) -> Floats:
        """A vector of each list of token ids, f32[b, H].

        Raises:
            QccError: an empty list, one longer than the window, an unknown token.
        """
        vocabulary = self.library.metadata.vocab_size
        for index, ids in enumerate(tokens):
            if not 1 <= len(ids) <= self.window:
                raise QccError(
                    f"text {index + 1} has {len(ids)} tokens, it must have 1 to {self.window}"
                )
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise QccError(f"text {index + 1}: the model has token ids 0 to {vocabulary - 1}")
        found = [np.zeros((0, self.dimensions), np.float32)]
        found += [self._run(part) for part in self._passes(tokens)]
        return np.concatenate(found)

    def tokenize(
        self, texts: Sequence[str], prompt_name: str | None = None, truncate: bool = True
    ) -> list[list[int]]:
        """The tokens of each text, as `embed` uses them."""
        prompt = self.usage.prompt(prompt_name)
        return [self._tokens(index, prompt + text, truncate) for index, text in enumerate(texts)]

    def _tokens(self, index: int, text: str, truncate: bool) -> list[int]:
        if self.usage.lower_case:
            text = text.lower()
        try:
            ids, count = self.tokenizer.encode_within(text, self.window)
        except QccError as err:
            raise QccError(f"text {index + 1}: {err}") from err
        if count > self.window:
            what = f"text {index + 1} has {count} tokens, the window is {self.window}"
            if not truncate:
                raise QccError(f"{what}; compile with a longer --context-window, or let it be cut")
            warnings.warn(f"{what}: its end is cut off", stacklevel=4)
        return ids

    def _passes(self, tokens: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Texts in order, as many at a time as fit."""
        meta = self.library.metadata
        part: list[Sequence[int]] = []
        used = 0
        for ids in tokens:
            if part and (
                used + len(ids) > meta.prefill_chunk_size or len(part) == meta.max_batch_size
            ):
                yield part
                part, used = [], 0
            part.append(ids)
            used += len(ids)
        if part:
            yield part

    def _run(self, texts: list[Sequence[int]]) -> Floats:
        ends = np.cumsum([len(ids) for ids in texts], dtype=np.int32)
        # A copy: the VM uses its memory again.
        return self.library.encode(np.concatenate(texts).astype(np.int32), ends).copy()


def unit(vectors: Floats) -> Floats:
    """f32[b, h], each divided by its length."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return cast("Floats", (vectors / np.maximum(lengths, LEAST_LENGTH)).astype(np.float32))


def similarities(vectors: Floats) -> Any:
    """f64[b, b]: the cosine of each two of f32[b, h]."""
    units = unit(vectors).astype(np.float64)
    return units @ units.T
