"""Each case's checkpoint and the program that its numbers are compared with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .cases import PARAMETERS, Case

# Names the file to which outcomes are added, for table.py.
RESULTS = "QCC_ARCHITECTURE_RESULTS"
CHECKS = ("test_numbers.py", "test_embeddings.py")

Logits = Callable[[list[int]], Any]  # token ids -> f32[n, V], every position


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any) -> Generator[None, Any, Any]:
    """Note the outcome of each check of a case as a line of JSON."""
    report = yield
    path = os.environ.get(RESULTS)
    parameters = getattr(item, "callspec", SimpleNamespace(params={})).params
    case = parameters.get("case")
    ended = report.when == "call" or not report.passed
    if path and case and ended and item.path.name in CHECKS:
        record = {
            "model": case.model_type,
            "case": case.name,
            "target": item.config.getoption("--target"),
            "check": item.name.partition("[")[0] + parameters.get("scheme", ""),
            "reference": "ours" if getattr(case, "reference", None) else "transformers",
            "passed": report.passed,
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return report


@pytest.fixture
def in_f32(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """in_f32(scheme): the one of the same codes in which --target computes in f32.

    A CPU always does; a GPU computes in the dtype that the scheme has in its name.
    """
    cpu = pytestconfig.getoption("--target") == "cpu"
    return lambda scheme: scheme if cpu else scheme.replace("f16", "f32")


@dataclass(frozen=True)
class Original:
    """A checkpoint and what it computes; `with_weights` takes others under the same names."""

    folder: Path
    logits: Logits
    with_weights: Callable[[dict[str, Any]], Logits]


@pytest.fixture(scope="module", params=PARAMETERS)
def case(request: Any) -> Case:
    """Each entry of the table."""
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def original(case: Case, request: Any, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """The case's checkpoint, computed by transformers in f32 or by a module of tests/reference."""
    if case.reference is not None:
        return _referenced(request.getfixturevalue("reference")(case.reference, **case.config))
    make, load, run = map(request.getfixturevalue, ("checkpoint", "hugging_face", "logits_of"))
    folder: Path = make(case.model_type, whole=True, largest=case.largest, **case.fields)

    def with_weights(weights: dict[str, Any]) -> Logits:
        """transformers reads them from a copy of the folder, as it reads any checkpoint."""
        from safetensors.numpy import load_file, save_file

        copy = tmp_path_factory.mktemp("our-weights") / "checkpoint"
        shutil.copytree(folder, copy)
        file = copy / "model.safetensors"
        shapes = {name: array.shape for name, array in load_file(file).items()}
        assert {name: array.shape for name, array in weights.items()} == shapes
        save_file(weights, file, {"format": "pt"})
        return lambda ids: run(load(copy), ids)

    return Original(folder, lambda ids: run(load(folder), ids), with_weights)


def _referenced(saved: Any) -> Original:
    """A `Saved` of tests/reference."""
    import torch

    def with_weights(weights: dict[str, Any]) -> Logits:
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        assert {name: t.shape for name, t in tensors.items()} == {
            name: t.shape for name, t in saved.tensors.items()
        }
        return lambda ids: saved.logits(ids, tensors)

    return Original(saved.folder, saved.logits, with_weights)
