"""CompileOptions: what `qcc compile` takes besides the model and the output folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qcc.compiler.sizes import SizeFlags
from qcc.targets.spec import BuildOptions

MIN_TOKENS = 128  # of a calibration text; of fewer the moments of a layer's inputs say nothing


@dataclass(frozen=True)
class Calibration:
    """`--calib`: the text by which a method knows a layer's inputs.

    `text` is a file, or "self": sampled from the model. `tokens` bounds it; None: the default.
    """

    text: str = "self"
    tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class CompileOptions:
    """A scheme and what changes it, targets, sizes, and how codes are chosen."""

    quant: str | None = None  # None: as an imported model's codes are, else q4f16_1
    targets: tuple[str, ...] = ("cpu",)
    sizes: SizeFlags = field(default_factory=SizeFlags)
    build: BuildOptions = field(default_factory=BuildOptions)
    allow_pickle: bool = False
    force: bool = False
    dump_ir: Path | None = None
    rules: tuple[tuple[str, str], ...] = ()  # (wildcard, FORMAT), the first that matches
    embedding: str | None = None  # FORMAT
    lm_head: str | None = None  # FORMAT
    method: str | None = None  # None: the scheme's
    calibration: Calibration = field(default_factory=Calibration)
    lora: Path | None = None  # folder of an adapter
    task: str = "auto"  # generation, embedding; auto: as the checkpoint's files say
