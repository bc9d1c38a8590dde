"""qcc generate: continue a text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qcc.compiler.cli._running import add_running_arguments, load, sampling_params
from qcc.runtime.errors import QccError

HELP = "continue a text with a compiled model"
EXAMPLE = """
qcc generate ./llama-q4 "Once upon a time" --n-predict 64
qcc generate ./Llama-3.2-1B --prompt-file story.txt --temperature 0 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the verb's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="artifact, or a checkpoint (compiled on first use)"
    )
    parser.add_argument("text", metavar="PROMPT", nargs="?", help="text to continue")
    parser.add_argument("--prompt", metavar="TEXT", default=None, help="the same as PROMPT")
    parser.add_argument(
        "--prompt-file", metavar="FILE", default=None, help="read it from a file; -: standard input"
    )
    parser.add_argument(
        "--n-predict",
        type=int,
        default=256,
        metavar="N",
        help="most new tokens; -1: as many as the context allows (default: 256)",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on where the model ends its text"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, text and figures, at the end"
    )
    add_running_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Stream the text to standard output and figures to standard error, or print one object."""
    prompt = read_prompt(args)
    if args.n_predict < -1:
        raise QccError(f"--n-predict {args.n_predict}: must be -1 or more")
    llm = load(args)
    params = sampling_params(
        llm,
        args,
        max_tokens=None if args.n_predict == -1 else args.n_predict,
        ignore_eos=args.ignore_eos,
    )
    stream = llm.stream(prompt, params)
    status = 0
    try:
        for piece in stream:
            if not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130  # what was generated stands, with its figures
    figures = facts(llm, stream.result)
    if args.json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        print()
        sys.stdout.flush()
        print(summary(figures), file=sys.stderr)
    return status


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt of the one place that was given; nothing on a terminal: the empty one.

    Raises:
        QccError: several places, or a file that is no UTF-8 text.
    """
    given = [x for x in (args.text, args.prompt, args.prompt_file) if x is not None]
    if len(given) > 1:
        raise QccError("give one of PROMPT, --prompt and --prompt-file")
    if args.prompt_file is None:
        if given:
            return _checked(given[0])
        if sys.stdin is None or sys.stdin.isatty():
            return ""
    where = args.prompt_file or "-"
    try:
        raw = sys.stdin.buffer.read() if where == "-" else Path(where).read_bytes()
        return raw.decode("utf-8").removesuffix("\n")  # as echo and editors end a text
    except UnicodeDecodeError as err:
        raise QccError(f"--prompt-file {where}: not UTF-8 text: {err.reason}") from err
    except OSError as err:
        raise QccError(f"--prompt-file {where}: cannot read: {err.strerror}") from err


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise QccError("the prompt is not UTF-8 text") from err
    return text


def facts(llm: Any, result: Any) -> dict[str, Any]:
    """What --json prints; times in seconds."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_token_ids": result.prompt_token_ids,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "finish_reason": result.finish_reason,
        "load_s": round(llm.load_seconds, 6),
        "prefill_s": round(result.times.prefill, 6),
        "decode_s": round(result.times.decode, 6),
        "prefill_tok_s": round(result.prefill_tokens_per_second, 3),
        "decode_tok_s": round(result.decode_tokens_per_second, 3),
        "threads": llm.threads,
    }


def summary(figures: dict[str, Any]) -> str:
    """One line of figures."""
    return (
        "load {load_s:.2f} s | prompt {prompt_tokens} tokens, {prefill_tok_s:.1f} tok/s | "
        "answer {completion_tokens} tokens, {decode_tok_s:.1f} tok/s | {finish_reason}"
    ).format(**figures)
