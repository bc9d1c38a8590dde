"""What holds of every mixture of experts: what a step reads, what stays floating, what rules do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from qcc.compiler.build import weight_specs
from qcc.compiler.driver import make_plan
from qcc.compiler.options import CompileOptions
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.scheme import list_schemes
from qcc.runtime.errors import QccError

from ..sequences import Runs
from .cases import CASES, QUANTIZED
from .conftest import Original

MIXTURES = [
    each
    for each, case in zip(QUANTIZED, (c for c in CASES if c.quantized), strict=True)
    if any("expert" in key for key in case.config)
]
ONE = [each for each in MIXTURES if each.id == "mixtral"]
MIXTRAL = next(case for case in CASES if case.name == "mixtral")
LATENT = next(case for case in CASES if case.name == "minicpm3")


@pytest.mark.parametrize("case", ONE, indirect=True)
def test_a_decode_step_reads_the_experts_in_use(
    case: Any, original: Original, compiled: Any, some_ids: Any
) -> None:
    """With NaN in place of an expert's scales a step gives NaN, or the very same logits."""
    runs = Runs(compiled(original.folder, "q4f16_1", **case.sizes))
    library, experts = runs.model.library, case.config["num_local_experts"]
    ids, held = some_ids(20), list(library.params)[: len(library.metadata.slots)]
    with runs.sequences(1) as (seq,):
        runs.verify(seq, ids[:-1])

        def step() -> Any:
            return runs.decode([runs.fork(seq)], ids[-1:])

        expected = step()
        for index, slot in enumerate(library.metadata.slots):
            name = slot.type.name
            if ".experts." not in name or not name.endswith("q_scale"):
                continue
            used = 0
            for expert in range(experts):
                scales = np.from_dlpack(held[index]).copy()
                scales.reshape(experts, -1)[expert] = np.nan
                library.bind([*held[:index], tvm.runtime.tensor(scales), *held[index + 1 :]])
                found = step()
                used += int(np.isnan(found).all())
                assert np.isnan(found).all() or np.array_equal(found, expected), (name, expert)
            assert used == 2, name
        library.bind(held)


def specs(folder: Path, scheme: str, *rules: tuple[str, str]) -> dict[str, Any]:
    """The weights by name."""
    options = CompileOptions(quant=scheme, rules=rules)
    return {spec.name: spec for spec in weight_specs(make_plan(folder, options, 64))}


@pytest.mark.parametrize("case", MIXTURES, indirect=True)
def test_routers_stay_floating(original: Original) -> None:
    """Under every scheme; all else that is a matrix of a layer is quantized."""
    for scheme in list_schemes():
        found = specs(original.folder, scheme)
        layers = [s for n, s in found.items() if ".layers." in n and len(s.shape) == 2]
        floating = {spec.name.split(".", 3)[3] for spec in layers if spec.role == "float"}
        assert {"mlp.gate.weight"} <= floating <= {
            "mlp.gate.weight", "mlp.shared_expert_gate.weight",
            "mlp.experts.gate_up_proj.bias", "mlp.experts.down_proj.bias",
        }  # fmt: skip
        for spec in layers:
            quantizes = not scheme.startswith("q0") and spec.role != "float"
            assert spec.format.is_float != quantizes, spec.name


@pytest.mark.parametrize("case", ONE, indirect=True)
def test_rules_for_experts(original: Original) -> None:
    """By our names or the checkpoint's; the experts of a layer have one format."""

    def bits(*rules: tuple[str, str]) -> list[int]:
        found = specs(original.folder, "q4f16_1", *rules)
        names = [f"model.layers.1.mlp.experts.{part}_proj.weight" for part in ("gate_up", "down")]
        return [found[name].format.bits for name in names]

    assert bits() == [4, 4]
    assert bits(("*.experts.*", "8/32")) == [8, 8]
    assert bits(("*.experts.*.w2.weight", "8/32")) == [4, 8]
    assert bits(("*.1.mlp.experts.gate_up_proj.weight", "6/32")) == [6, 4]
    assert bits(("*.1.block_sparse_moe.experts.*.w[13].weight", "6/32")) == [6, 4]
    for apart in ("*.experts.3.*", "*.experts.*.w1.weight"):
        with pytest.raises(SchemeError, match=r"gate_up_proj.weight holds all experts of its lay"):
            bits((apart, "8/32"))
    with pytest.raises(SchemeError, match=r"would quantize .*gate.weight.*routers stay floating"):
        bits(("*.block_sparse_moe.gate.weight", "8/32"))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (MIXTRAL, "a mixture of experts is not calibrated"),
        (LATENT, "latent attention takes 'model.layers.0.self_attn.kv_b_proj.weight' apart"),
    ],
    indirect=["case"],
    ids=["mixtral", "minicpm3"],
)
@pytest.mark.parametrize(
    "asked", [("q4f16_1", "--method", "gptq"), ("static",)], ids=lambda asked: asked[-1]
)
def test_what_is_not_calibrated(
    original: Original, cli: Any, static_scheme: str, tmp_path: Path, asked: tuple[str, ...],
    reason: str,
) -> None:  # fmt: skip
    """It is said in one line, before anything is built."""
    asked = (static_scheme,) if asked == ("static",) else asked
    error = cli("compile", original.folder, "-o", tmp_path / "o", "--quant", *asked).error()
    assert reason in error and "--method rtn" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("case", ONE, indirect=True)
def test_experts_do_not_run_layer_by_layer(original: Original) -> None:
    from qcc.compiler.calibrate.layers import LayerwiseModel

    with pytest.raises(QccError, match="mixtures of experts are not run layer by layer"):
        LayerwiseModel(original.folder)


@pytest.mark.parametrize("case", ONE, indirect=True)
def test_tune_gives_the_experts_of_a_layer_one_format(original: Original) -> None:
    from qcc.compiler.cli.tune import _units
    from qcc.compiler.reference import Original as Checkpoint

    found = specs(original.folder, "q4f16_1")
    with Checkpoint(original.folder).open() as checkpoint:
        units = _units(tuple(found.values()), checkpoint, set(), fused=False)
        named = {unit.name: unit for unit in units if ".mlp." in unit.name}
        assert set(named) == {name for name in found if ".experts." in name}
        for name, unit in named.items():
            assert unit.read().shape == unit.shape == found[name].shape
