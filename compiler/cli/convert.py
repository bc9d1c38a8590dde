"""qcc convert: weights and configuration only; `qcc compile` adds libraries to the same folder."""

from __future__ import annotations

import argparse
import shlex

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
    words = ["qcc", "compile", args.model, *_flags(args), "-o", str(out)]
    print(f"{out}: add a library with `{shlex.join(words)}`")
    return 0


def _flags(args: argparse.Namespace) -> list[str]:
    """The flags that decide the weights: a compile into the folder must have the same."""
    given = [
        ("--quant", args.quant),
        *(("--set", rule) for rule in args.set),
        ("--embedding", args.embedding),
        ("--lm-head", args.lm_head),
        ("--method", args.method),
        ("--calib", args.calib if args.calib != "self" else None),
        ("--calib-tokens", args.calib_tokens),
        ("--lora", args.lora),
    ]
    found = [str(word) for pair in given if pair[1] is not None for word in pair]
    return found + (["--allow-pickle"] if args.allow_pickle else [])
