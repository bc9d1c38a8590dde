"""LayerwiseModel: transformers' model of a checkpoint, of which one layer is in memory at a time.

The model is made without numbers; those of a layer are read from the checkpoint, widened to f32,
and dropped after use. What a layer is called with beside the hidden states (masks, rotations) is
whatever transformers' own forward passes: it runs with recorders in the layers' places. No code of
the checkpoint's folder is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qcc.compiler.calibrate.libraries import torch
from qcc.compiler.calibrate.skeleton import decoder_layers, sources_of, without_numbers
from qcc.compiler.calibrate.states import Hidden
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.quant_schemes.packing import Array
from qcc.runtime.errors import QccError

Windows = Sequence[Sequence[int]]
LONG = 1024  # tokens; attention over more is torch's own: eager's scores [b, heads, t, t] are large
_KEPT_SHAPES = 4  # [b, t] whose arguments are remembered: masks may be large


class LayerwiseModel:
    """A causal language model in f32 on `device`: CUDA where there is one, else the CPU.

    `sources` names the tensor of the checkpoint that fills each parameter. Parameters outside of
    the layers stay in memory, but for the embedding and the head.
    """

    def __init__(
        self,
        folder: Path | str,
        checkpoint: Checkpoint | None = None,
        device: str | None = None,
    ) -> None:
        """Make the model of a folder's config.json over the tensors of a checkpoint.

        Args:
            folder: of config.json.
            checkpoint: open, and the caller's to close; None: the one in `folder`.
            device: of torch, as cuda:1.

        Raises:
            QccError: transformers cannot make the model, or the tensors are not its own.
        """
        self.folder = Path(folder)
        self.checkpoint = checkpoint or Checkpoint.open(self.folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = without_numbers(self.folder)
        self.sources = sources_of(self.model, self.checkpoint)
        self.prefix, self.layers = decoder_layers(self.model, self.folder)
        self._parameter_of = {source: name for name, source in reversed(self.sources.items())}
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.vocabulary, self.width = map(int, embedding.weight.shape)
        self.head_name = next(name for name, m in self.model.named_modules() if m is head)
        self._embedding, self._head = self._names_in(embedding), self._names_in(head)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        for name in self.sources:
            within = name.startswith(f"{self.prefix}.")
            if not within and name not in (*self._embedding, *self._head):
                self.load(name)
        self._forwards = [layer.forward for layer in self.layers]
        self._seen: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        self._replay: Any = None
        self._arguments: dict[tuple[int, int], list[Any]] = {}
        self._wraps = False  # the model takes the first of what a layer returns
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._intercept, index)
        try:
            self._arguments_of(1, 1)
        except QccError:
            self._wraps = True

    def load(self, parameter: str, dtype: Any = None) -> None:
        """Read a parameter from the checkpoint; `dtype` of torch, None: float32."""
        numbers = self.checkpoint.read(self.sources[parameter]).astype(np.float32, copy=False)
        self.set(parameter, torch.from_numpy(numbers).to(dtype or torch.float32))

    def set(self, parameter: str, numbers: Any) -> None:
        """Give a parameter the numbers of a tensor; nothing is copied."""
        owner, _, leaf = parameter.rpartition(".")
        held = torch.nn.Parameter(numbers.to(self.device), requires_grad=False)
        self.model.get_submodule(owner)._parameters[leaf] = held

    def get(self, parameter: str) -> Any:
        """The numbers of a parameter that is loaded, as a tensor."""
        return self.model.get_parameter(parameter).data

    def parameter_of(self, source: str) -> str:
        """The parameter that a tensor of the checkpoint fills."""
        return self._parameter_of[source]

    def names_of_layer(self, index: int) -> list[str]:
        """Names of a layer's parameters."""
        return [name for name in self.sources if name.startswith(f"{self.prefix}.{index}.")]

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Within it a layer has its numbers; gives its module."""
        with self._loaded(self.names_of_layer(index)):
            yield self.layers[index]

    @contextmanager
    def head(self) -> Iterator[Any]:
        """Within it the head has its numbers; gives its module."""
        with self._loaded(self._head):
            yield self.model.get_output_embeddings()

    def use_fast_attention(self) -> None:
        """Use torch's own attention where the model can: no scores in memory, other rounding."""
        if self.model._supports_sdpa:
            self.model.set_attn_implementation("sdpa")
            self._arguments.clear()

    def embed(self, windows: Windows, folder: Path | None = None) -> Hidden:
        """The hidden states before the first layer.

        Args:
            windows: tokens, at least one a window.
            folder: where hidden states lie if they are large; None: the system's.
        """
        highest = max(max(window) for window in windows)
        if highest >= self.vocabulary:
            raise QccError(
                f"{self.folder}: the text has token {highest}, the model {self.vocabulary} tokens; "
                "the tokenizer belongs to another model"
            )
        hidden = Hidden([len(window) for window in windows], self.width, folder)
        if max(hidden.lengths) > LONG:
            self.use_fast_attention()
        with self._loaded(self._embedding):
            for batch, block in zip(hidden.batches, hidden.blocks, strict=True):
                ids = torch.zeros((len(batch.windows), batch.length), dtype=torch.int64)
                for row, window in zip(ids, batch.windows, strict=True):
                    row[: len(windows[window])] = torch.tensor(windows[window])
                self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
                block.copy_(self._seen[0][0])
        return hidden

    def run_layer(self, index: int, x: Any) -> Any:
        """A loaded layer's output for hidden states f32[b, t, h], on the device; so is its own."""
        args, kwargs = self._arguments_of(*x.shape[:2])[index]
        out = self._forwards[index](x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, index: int, hidden: Hidden) -> None:
        """Replace hidden states by what a loaded layer makes of them.

        Raises:
            QccError: that is NaN or infinite.
        """
        for number, block in enumerate(hidden.blocks):
            block.copy_(self.run_layer(index, block.to(self.device)))
            if not torch.isfinite(block[hidden.valid(number)]).all():
                raise QccError(
                    f"{self.folder}: {self.prefix}.{index} gives NaN or infinite numbers on the "
                    "text; the checkpoint is damaged: download it again"
                )

    def logits(self, x: Any) -> Any:
        """f32[b, t, V], the head being loaded, for the hidden states after the last layer."""
        self._replay = x.to(self.device)
        try:
            return self.model(inputs_embeds=self._replay, use_cache=False).logits
        finally:
            self._replay = None

    def whole(self, dtype: Any) -> Any:
        """Transformers' model with all its numbers, in a dtype of torch; this object is spent."""
        for layer in self.layers:
            del layer.forward
        self.use_fast_attention()
        loaded: dict[str, str] = {}  # source -> parameter: a tied head is the embedding
        for name, source in self.sources.items():
            if source in loaded:
                self.set(name, self.get(loaded[source]))
            else:
                self.load(name, dtype)
                loaded[source] = name
        return self.model

    def _intercept(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """In a layer's place: remember what it is called with, pass the hidden states on."""
        if self._replay is not None:
            return self._returned(self._replay)
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        self._check(hidden)
        self._seen[index] = hidden, tuple(rest), kwargs
        return self._returned(hidden)

    def _returned(self, hidden: Any) -> Any:
        """Hidden states as a layer of the model returns them."""
        return (hidden,) if self._wraps else hidden

    def _check(self, hidden: Any) -> None:
        """Refuse what are no hidden states of several sequences."""
        if hidden.ndim != 3:
            raise QccError(
                f"{self.folder}: {type(self.model).__name__} hands its layers hidden states of "
                f"{hidden.ndim} dimensions; such a model is not supported"
            )

    def _arguments_of(self, batch: int, length: int) -> list[Any]:
        """What each layer is called with beside hidden states [batch, length, h]."""
        shape = batch, length
        if shape not in self._arguments:
            while len(self._arguments) >= _KEPT_SHAPES:
                del self._arguments[next(iter(self._arguments))]
            nothing = torch.zeros((1, 1, self.width), device=self.device)
            nothing = nothing.expand(batch, length, self.width)
            self._check(self.model.base_model(inputs_embeds=nothing, use_cache=False)[0])
            self._arguments[shape] = [self._seen[i][1:] for i in range(len(self.layers))]
            self._seen.clear()
        return self._arguments[shape]

    def _names_in(self, module: Any) -> list[str]:
        """Names of the parameters of a module of the model."""
        prefix = next(name for name, m in self.model.named_modules() if m is module)
        return [name for name in self.sources if name.startswith(f"{prefix}.")]

    @contextmanager
    def _loaded(self, names: Sequence[str]) -> Iterator[None]:
        """Within it these parameters have numbers."""
        try:
            for name in names:
                self.load(name)
            yield
        finally:
            for name in names:
                nothing = self.model.get_parameter(name).to("meta")
                owner, _, leaf = name.rpartition(".")
                held = torch.nn.Parameter(nothing, requires_grad=False)
                self.model.get_submodule(owner)._parameters[leaf] = held


def logits_of_windows(
    folder: Path | str,
    windows: Windows,
    checkpoint: Checkpoint | None = None,
    device: str | None = None,
) -> Iterator[Array]:
    """The logits f32[n, V] of each window of n tokens, in order; what a large model is judged by.

    All windows go through a layer before the next is read. Arguments are those of LayerwiseModel.
    """
    model = LayerwiseModel(folder, checkpoint, device)
    hidden = model.embed(windows)
    for index in range(len(model.layers)):
        with model.layer(index):
            model.advance(index, hidden)
    with model.head():
        for states in hidden.by_window():
            yield model.logits(states[None])[0].float().cpu().numpy()
