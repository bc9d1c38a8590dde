"""quantize_layers: a checkpoint's weights, quantized layer after layer for the inputs they get.

The inputs of a layer are those that the quantized layers before it make. Within a layer, weights
are quantized in the order in which they run: o_proj sees what quantized q, k and v make of the
text. The embedding, and a head tied to it, are left to the converter. A method that needs no text
is told of no inputs: then only their largest numbers are gathered, for weights that store the scale
of their inputs (`WeightSpec.input_scale`). These inputs are not rounded themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcc.compiler.calibrate.folds import find_folds
from qcc.compiler.calibrate.layers import LayerwiseModel, Windows
from qcc.compiler.calibrate.libraries import suited_threads, torch
from qcc.compiler.calibrate.matrices import matrix_of, sources_from
from qcc.compiler.calibrate.parts import Parts
from qcc.compiler.calibrate.streams import Streams
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.spec import INPUT_SCALE, WeightSpec
from qcc.quant_schemes.packing import Array, dequantize, dequantize_codes, float_dtype, store
from qcc.quant_schemes.rounding.method import Inputs, Method
from qcc.runtime.errors import QccError

Given = Callable[[WeightSpec], Mapping[str, Array] | None]
# Stage from 1, stages (layers, and an untied head), the weight that is done, seconds left.
Progress = Callable[[int, int, str, float], None]


def quantize_layers(
    folder: Path | str,
    specs: Sequence[WeightSpec],
    method: Method,
    windows: Windows,
    work: Path,
    progress: Progress | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    device: str | None = None,
    original: bool = False,
) -> Given:
    """Quantize every linear weight whose format is quantized, and an untied head.

    Args:
        folder: of config.json.
        specs: the weights of the compiled model.
        method: chooses codes, from weights and inputs.
        windows: the calibration text as tokens.
        work: a folder for what is finished, named by all that decides the result; a run that finds
            one goes on at the first layer that is not whole.
        progress: called after each weight.
        checkpoint: open; None: the one in `folder`.
        device: of torch; None: CUDA where there is one.
        original: run the original model beside, and tell the method `Inputs.cross`.

    Returns:
        What convert_weights takes as `given`: reads a weight's parts from `work`.

    Raises:
        QccError: the model cannot run layer by layer, numbers are NaN or infinite.
    """
    run = _Calibration(folder, specs, method, work, progress, checkpoint, device)
    with suited_threads(run.model.width):
        made = run.quantize(windows, original)
    by_name = {spec.name: spec for spec in specs}

    def given(spec: WeightSpec) -> Mapping[str, Array] | None:
        if spec.name not in made:
            return None
        parts = run.parts.load(by_name[spec.name])
        if parts is None:
            raise QccError(f"{work}: {spec.name} was removed or damaged meanwhile; start again")
        return parts

    return given


class _Calibration:
    """One call of quantize_layers."""

    def __init__(
        self,
        folder: Path | str,
        specs: Sequence[WeightSpec],
        method: Method,
        work: Path,
        progress: Progress | None,
        checkpoint: Checkpoint | None,
        device: str | None,
    ) -> None:
        self.model = LayerwiseModel(folder, checkpoint, device)
        self.model.use_fast_attention()
        self.method = method
        self.parts = Parts(work)
        self.progress = progress
        self.specs = {spec.name: spec for spec in specs}
        count = len(self.model.layers)
        self.stages = [self._of_stage(f"{self.model.prefix}.{i}.", "linear") for i in range(count)]
        self.head = self._of_stage(f"{self.model.head_name}.", "lm_head")
        self._left = self._size([*self.head, *(spec for stage in self.stages for spec in stage)])
        self._done = 0
        self._started = time.monotonic()

    def quantize(self, windows: Windows, original: bool) -> set[str]:
        """Quantize or restore stage by stage; names of all weights that are stored now."""
        model, made = self.model, set[str]()
        hidden = model.embed(windows, self.parts.work)
        beside = hidden.copy() if original else None
        for index, specs in enumerate(self.stages):
            with model.layer(index):
                before = {name: model.get(name) for name in model.names_of_layer(index)}

                def run(x: Any, index: int = index) -> Any:
                    return model.run_layer(index, x)

                stage = f"{model.prefix}.{index}"
                originals = before if original else {}
                streams = Streams(model, run, hidden, beside, originals, stage)
                made |= self._stage(stage, specs, streams)
                if self.head or index + 1 < len(self.stages):
                    model.advance(index, hidden)
                    if beside is not None:
                        with streams.original_weights():
                            model.advance(index, beside)
        if self.head:
            with model.head():
                streams = Streams(model, model.logits, hidden, beside, {})
                made |= self._stage(model.head_name, self.head, streams)
        return made

    def _stage(self, stage: str, specs: Sequence[WeightSpec], streams: Streams) -> set[str]:
        """Give the weights of a stage their quantized numbers; names of what is stored."""
        finished = self.parts.finished(stage, self.specs)
        if finished is None:
            stored = [spec.name for spec in self._quantize(specs, streams)]
            self.parts.finish(stage, stored)
            return set(stored)
        for name, parts in finished.items():
            spec = self.specs[name]
            n, k = spec.shape[0], spec.shape[-1]
            self._set(spec, dequantize(parts, spec.format, n, k))
        self._left -= self._size(specs)
        return set(finished)

    def _quantize(self, specs: Sequence[WeightSpec], streams: Streams) -> list[WeightSpec]:
        """Quantize group after group; the weights that are stored."""
        if not specs:
            return []
        done = self._scale(specs, streams)
        modules = {name: spec for spec in specs for name in self._modules_of(spec)}
        for group in streams.groups(list(modules)):
            together = list({modules[name].name: modules[name] for name in group}.values())
            for spec in together:
                apart = set(self._modules_of(spec)) - set(group)
                assert not apart, f"{spec.name}: {apart} have inputs of their own"
            moments = streams.moments(group[0], self.method.needs_text, self.method.hessian)
            inputs = moments.inputs() if self.method.needs_text else None
            for spec in together:
                self._quantize_weight(spec, inputs, moments.scale())
            done += together
        return done

    def _scale(self, specs: Sequence[WeightSpec], streams: Streams) -> list[WeightSpec]:
        """Let the method scale columns; the floating weights that this changed, stored."""
        if self.method.scales is None or not streams.prefix:
            return []
        model, changed = self.model, set[str]()

        def run() -> Any:
            return streams.run(streams.probe())

        for fold in find_folds(model, streams.prefix, run):
            users = [spec for spec in specs if set(self._modules_of(spec)) <= set(fold.modules)]
            if not users:
                continue
            matrices = [matrix_of(spec, self._read) for spec in users]
            inputs = streams.moments(fold.modules[0]).inputs()
            factors = self.method.scales(matrices, [spec.format for spec in users], inputs)
            scales = torch.from_numpy(factors).to(model.device)
            if fold.apply(model, scales, run):
                changed |= {*fold.producers, *(f"{name}.weight" for name in fold.modules)}
        stored = []
        for spec in self.specs.values():
            names = {model.parameter_of(source.name) for source in spec.sources}
            if spec.format.is_float and names & changed:
                numbers = matrix_of(spec, self._read).astype(float_dtype(spec.format.dtype))
                self.parts.save(spec, {"weight": numbers})
                self._set(spec, numbers.astype(np.float32))
                stored.append(spec)
        return stored

    def _quantize_weight(self, spec: WeightSpec, inputs: Inputs | None, scale: Array) -> None:
        """Choose codes; `scale` f32[1] is that of the inputs, stored where the weight wants it."""
        quantized = self.method.quantize(matrix_of(spec, self._read), spec.format, inputs)
        numbers = dequantize_codes(quantized, spec.format)
        if not np.isfinite(numbers).all():
            raise QccError(
                f"{spec.name}: a scale is beyond the range of {spec.format.dtype} (65504); choose "
                "a scheme whose name says bf16 or f32, as q4f32_1"
            )
        parts = store(quantized, spec.format)
        if spec.input_scale:
            parts[INPUT_SCALE] = scale
        self.parts.save(spec, parts)
        self._set(spec, numbers)
        self._tell(spec)

    def _tell(self, spec: WeightSpec) -> None:
        """Report a weight that is done."""
        self._done += self._size([spec])
        seconds = (time.monotonic() - self._started) * (self._left / self._done - 1)
        stages = [*self.stages, *([self.head] if self.head else [])]
        at = next(i for i, stage in enumerate(stages) if spec in stage)
        if self.progress:
            self.progress(at + 1, len(stages), spec.name, seconds)

    def _set(self, spec: WeightSpec, numbers: Array) -> None:
        """Give the modules of a weight its numbers."""
        for source, part in sources_from(spec, numbers.reshape(spec.shape)).items():
            self.model.set(self.model.parameter_of(source), torch.from_numpy(part))

    def _read(self, source: str) -> Array:
        """A source tensor as the model has it now."""
        numbers: Array = self.model.get(self.model.parameter_of(source)).cpu().numpy()
        return numbers

    def _modules_of(self, spec: WeightSpec) -> list[str]:
        """Names of the modules that hold a weight's sources."""
        names = [self.model.parameter_of(source.name) for source in spec.sources]
        return [name.removesuffix(".weight") for name in names]

    def _of_stage(self, prefix: str, role: str) -> list[WeightSpec]:
        """The quantized weights of a role whose first source lies in a module."""
        return [
            spec
            for spec in self.specs.values()
            if spec.role == role
            and not spec.format.is_float
            and self.model.parameter_of(spec.sources[0].name).startswith(prefix)
        ]

    def _size(self, specs: Sequence[WeightSpec]) -> int:
        return sum(math.prod(spec.shape) for spec in specs)
