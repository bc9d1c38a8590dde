"""Which instructions a processor's kernels use, in which order they are preferred, what they need.

The flags are those of Linux (arch/x86/include/asm/cpufeatures.h, the arm64 ELF hwcaps); the levels
x86-64-v2 to v4 are those of the x86-64 psABI, without what no compiler uses unasked.
"""

from __future__ import annotations

from typing import Any

import pytest

from qcc.runtime.machine import missing
from qcc.targets.cpu.build import requires, resolve
from qcc.targets.cpu.isa import AARCH64, X86_64, isa_of, rank_of
from qcc.targets.spec import BuildOptions

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
PROCESSORS = [
    ("x86_64", "x86-64-v2", "sse"),
    ("x86_64", "x86-64-v3", "avx2"),
    ("x86_64", "alderlake", "avx2_vnni"),
    ("x86_64", "x86-64-v4", "avx512"),
    ("x86_64", "icelake-server", "avx512_vnni"),
    ("x86_64", "znver5", "avx512_vnni"),
    ("x86_64", "sapphirerapids", "avx512_amx"),
    ("aarch64", "cortex-a53", "neon"),
    ("aarch64", "cortex-a76", "neon_dotprod"),
    ("aarch64", "neoverse-v1", "neon_i8mm"),
]
V2 = {"pni", "ssse3", "sse4_1", "sse4_2", "popcnt"}
V3 = V2 | {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def target_of(machine: str, mcpu: str) -> Any:
    return resolve(BuildOptions(mcpu, TRIPLES[machine]))[0]


@pytest.mark.parametrize(("machine", "mcpu", "name"), PROCESSORS, ids=lambda value: str(value))
def test_instructions_of_a_processor(machine: str, mcpu: str, name: str) -> None:
    target, known = target_of(machine, mcpu), X86_64 if machine == "x86_64" else AARCH64
    assert isa_of(target) == known[name]
    assert rank_of(target) == (name, list(known).index(name))


def test_wider_instructions_are_preferred() -> None:
    """More lanes, then a dot product in one instruction, then tiles."""
    for known in (X86_64, AARCH64):
        found = [(isa.lanes, str(isa.dot) != "maddubs", isa.tiles) for isa in known.values()]
        assert found == sorted(found) and len(set(known.values())) == len(known)


@pytest.mark.parametrize(
    ("mcpu", "flags"), [("x86-64", set()), ("x86-64-v2", V2), ("x86-64-v3", V3), ("x86-64-v4", V4)]
)
def test_flags_of_levels(mcpu: str, flags: set[str]) -> None:
    found = requires(target_of("x86_64", mcpu))
    assert found["machine"] == "x86_64" and set(found["flags"]) == flags


def test_flags_of_processors() -> None:
    """Tiles are no need: the kernels use them where the process has them."""
    flags = set(requires(target_of("x86_64", "sapphirerapids"))["flags"])
    assert flags >= V4 | {"avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "gfni"}
    assert not any(flag.startswith("amx") for flag in flags)
    assert "avx_vnni" in requires(target_of("x86_64", "alderlake"))["flags"]
    arm = requires(target_of("aarch64", "neoverse-v1"))
    assert arm["machine"] == "aarch64" and {"asimddp", "i8mm", "sve"} <= set(arm["flags"])
    assert requires(target_of("aarch64", "cortex-a53"))["flags"] == ["asimd"]


def test_native_runs_here() -> None:
    target, name = resolve(BuildOptions("native"))
    assert name.startswith("cpu-") and missing(requires(target)) == []


def test_a_library_whose_flags_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("qcc.runtime.machine.cpu_flags", lambda: V3)
    assert missing(requires(target_of("x86_64", "x86-64-v3"))) == []
    assert missing(requires(target_of("x86_64", "x86-64-v4"))) == sorted(V4 - V3)
    assert missing(requires(target_of("aarch64", "cortex-a53"))) == ["an aarch64 processor"]
