"""qcc quickstart: compile the bundled model and stream a story from it."""

from __future__ import annotations

import argparse

HELP = "compile the bundled model for this machine and stream a story"
EXAMPLE = 'qcc quickstart --prompt "Once upon a time, there was a fox named Mia"'
PROMPT = "Once upon a time, there was a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `quickstart`."""
    parser.add_argument("--prompt", default=PROMPT, help="how the story begins")
    parser.add_argument("--quant", default="q4f16_1", metavar="SCHEME", help="scheme or YAML file")
    parser.add_argument("--n-predict", type=int, default=160, metavar="N", help="most new tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    parser.add_argument("--seed", type=int, default=7, help="of the sampling")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default=None,
        help="artifact folder (default: in the cache)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile, load, tell."""
    from pathlib import Path

    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.steps import Steps
    from qcc.runtime.files import cache_dir
    from qcc.tutorials.tiny import MODEL_DIR

    out = Path(args.output) if args.output else cache_dir() / "quickstart"
    steps = Steps()
    steps.line(f"Compiling the bundled model with {args.quant} for this CPU")
    compile_model(str(MODEL_DIR), out, CompileOptions(quant=args.quant, force=True), steps)
    with steps.step("Load") as step:
        from qcc.runtime import LLM

        llm = LLM(out, threads=args.threads)
        step.note = f"{llm.threads} threads"
    params = llm.default_params(
        temperature=args.temperature, max_tokens=args.n_predict, seed=args.seed
    )
    steps.line("")
    print(args.prompt, end="", flush=True)
    stream = llm.stream(args.prompt, params)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    steps.line("")
    result = stream.result
    prefill, decode = result.prefill_tokens_per_second, result.decode_tokens_per_second
    counts = f"{result.prompt_tokens} + {result.completion_tokens} tokens"
    steps.line(f"  {counts}: prefill {prefill:.0f}, decode {decode:.0f} tok/s")
    steps.line(f"  next: qcc chat {out}   qcc show {out}")
    return 0
