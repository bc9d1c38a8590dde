"""Folds: where a factor on a weight's columns can be taken back by what makes its input.

Found by running, not by names: a norm whose output is, as it is, the input of linear layers takes
1/s into its weight and bias. Of a gated MLP, whose product nothing shows to a hook, up_proj takes
it into its rows for down_proj. `apply` tells whether the layer still computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qcc.compiler.calibrate.layers import LayerwiseModel
from qcc.compiler.calibrate.libraries import torch

# |change of the layer's output| / its largest: f32 makes 1e-6, a wrong fold 1e-2.
SAME = 1e-4


@dataclass(frozen=True)
class Fold:
    """Parameters whose first axis is divided, and the modules whose weights' columns grow."""

    producers: tuple[str, ...]
    modules: tuple[str, ...]

    def apply(self, model: LayerwiseModel, scales: Any, run: Callable[[], Any]) -> bool:
        """Scale the parameters f32[k]; False, and nothing is changed, if `run` then differs."""
        weights = tuple(f"{name}.weight" for name in self.modules)
        before = {name: model.get(name) for name in (*self.producers, *weights)}
        expected = run()
        for name in self.producers:
            numbers = before[name]
            model.set(name, numbers / scales.view(-1, *[1] * (numbers.ndim - 1)))
        for name in weights:
            model.set(name, before[name] * scales)
        if (run() - expected).abs().max() <= SAME * expected.abs().max():
            return True
        for name, numbers in before.items():
            model.set(name, numbers)
        return False


def find_folds(model: LayerwiseModel, prefix: str, run: Callable[[], Any]) -> list[Fold]:
    """What can be folded in a layer whose modules' names begin with `prefix`; see the module."""
    modules = {
        f"{prefix}.{name}": module
        for name, module in model.model.get_submodule(prefix).named_modules()
        if name
    }
    norms = {name: module for name, module in modules.items() if _is_norm(module)}
    linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    made: dict[str, Any] = {}
    taken: dict[str, Any] = {}

    def note_output(name: str, _module: Any, _args: Any, output: Any) -> None:
        made[name] = output

    def note_input(name: str, _module: Any, args: tuple[Any, ...]) -> None:
        taken[name] = args[0]

    handles = [m.register_forward_hook(partial(note_output, n)) for n, m in norms.items()]
    handles += [m.register_forward_pre_hook(partial(note_input, n)) for n, m in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for norm, output in made.items():
        users = tuple(name for name, x in taken.items() if _same(x, output))
        if users:
            found.append(Fold(_parameters(model, norm), users))
    for down in linears:
        parent, _, leaf = down.rpartition(".")
        if leaf == "down_proj" and f"{parent}.up_proj" in linears:
            found.append(Fold(_parameters(model, f"{parent}.up_proj"), (down,)))
    return found


def _is_norm(module: Any) -> bool:
    """Whether a module has a weight of one axis and nothing within it."""
    weight = getattr(module, "weight", None)
    leaf = not any(True for _ in module.children())
    return leaf and isinstance(weight, torch.nn.Parameter) and weight.ndim == 1


def _same(x: Any, y: Any) -> bool:
    """Whether two tensors, both alive, are the same memory."""
    return bool(x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride())


def _parameters(model: LayerwiseModel, module: str) -> tuple[str, ...]:
    return tuple(name for name in model.sources if name.startswith(f"{module}."))
