"""qcc convert: weights and configuration only; `qcc compile` adds libraries to the same folder."""

from __future__ import annotations

import argparse

from qcc.compiler.cli.compile import add_model_arguments, model_options

HELP = "quantize the weights and write the configuration, without a library"
EXAMPLE = "qcc convert ./Llama-3.2-1B --quant q8f16_1 -o ./llama-q8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `compile` has about the model."""
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and say where."""
    from pathlib import Path

    from qcc.compiler.driver import convert_model
    from qcc.compiler.steps import Steps

    out = convert_model(args.model, Path(args.output), model_options(args), Steps())
    quant = f" --quant {args.quant}" if args.quant else ""
    print(f"{out}: add a library with `qcc compile {args.model}{quant} -o {out}`")
    return 0
