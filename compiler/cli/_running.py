"""What generate and chat share: flags, the model's folder, the sampling parameters. Not a verb."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcc.runtime.engine.llm import LLM, SamplingParams

# Flag, type, metavar, help. The artifact's own values are the defaults of the sampling flags.
SAMPLING: tuple[tuple[str, Any, str, str], ...] = (
    ("--temperature", float, "T", "0: always the likeliest token"),
    ("--top-k", int, "K", "only the K likeliest tokens (0: all)"),
    ("--top-p", float, "P", "only the likeliest tokens that together reach P"),
    ("--min-p", float, "P", "only tokens at least P times as likely as the likeliest"),
    ("--repetition-penalty", float, "R", "above 1: tokens seen before are less likely"),
    ("--presence-penalty", float, "R", "-2 to 2, for each token that the answer has"),
    ("--frequency-penalty", float, "R", "-2 to 2, for each time that the answer has it"),
)


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of how it samples and how a model runs."""
    sampling = parser.add_argument_group(
        "sampling (defaults: the model's mlc-chat-config.json and generation_config.json)"
    )
    for flag, kind, metavar, text in SAMPLING:
        sampling.add_argument(flag, type=kind, default=None, metavar=metavar, help=text)
    sampling.add_argument("--seed", type=int, default=None, metavar="N", help="same N, same text")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before STR (repeatable)"
    )
    running = add_device_arguments(parser)
    running.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: the cores)"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of how a model runs, but for its threads; their group in the help."""
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="cpu", help="target, or name of one library")
    running.add_argument(
        "--context-window",
        type=int,
        default=None,
        metavar="N",
        help="tokens of prompt and answer (default: as compiled); less takes less memory",
    )
    add_precision_argument(running)
    running.add_argument(
        "--kv",
        choices=("f32", "f16", "int8"),
        default=None,
        help="how the KV cache keeps keys and values (default: f16, f32 with --precision high)",
    )
    add_weights_argument(running)
    return running


def add_weights_argument(running: Any) -> None:
    """The flag of where the weights lie; `running` is a group of a parser."""
    running.add_argument(
        "--weights",
        choices=("ram", "mmap"),
        default="ram",
        help="ram: read into memory, fastest; mmap: pages shared with other processes",
    )


def add_precision_argument(running: Any) -> None:
    """The flag of what activations are computed in; `running` is a group of a parser."""
    running.add_argument(
        "--precision",
        choices=("high", "low"),
        default=None,
        help="high: float32 activations; low: int8 activations, faster (default: low)",
    )


def text_lines(text: str) -> list[str]:
    """The texts of a file, one a line, without its byte order mark; blank lines are left out.

    Other signs that break lines for Unicode, as U+2028 and form feed, belong to their text.
    """
    lines = io.StringIO(text.removeprefix("\ufeff"), newline=None).read().split("\n")
    return [line for line in lines if line.strip()]


def artifact_folder(model: str) -> Path:
    """The artifact at `model`; a checkpoint is compiled into the cache first.

    Raises:
        QccError: neither is there.
    """
    folder = Path(model)
    is_checkpoint = (folder / "config.json").exists() and not (folder / "qcc.json").exists()
    if folder.is_dir() and not is_checkpoint:
        return folder
    from qcc.compiler.driver import compile_cached
    from qcc.compiler.steps import Steps

    return Path(compile_cached(model, Steps()))


def shown_progress() -> Callable[[str, int, int], None] | None:
    """Shows how far a long step of loading is, on a terminal; else None."""
    if not sys.stderr.isatty():
        return None

    def progress(what: str, done: int, total: int) -> None:
        end = "\r\x1b[K" if done >= total else ""
        sys.stderr.write(f"\r\x1b[K{what}: {done / max(total, 1):.0%}{end}")
        sys.stderr.flush()

    return progress


def load(args: argparse.Namespace, max_batch_size: int = 1) -> LLM:
    """The model, for so many answers at a time; progress on a terminal only."""
    folder = artifact_folder(args.model)
    from qcc.runtime.engine.llm import LLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        llm = LLM(
            folder,
            args.device,
            args.threads,
            args.context_window,
            max_batch_size=max_batch_size,
            progress=shown_progress(),
            precision=args.precision,
            kv=args.kv,
            weights=args.weights,
        )
    for warning in caught:
        print(f"qcc: warning: {warning.message}", file=sys.stderr)
    return llm


def sampling_params(llm: LLM, args: argparse.Namespace, **changes: Any) -> SamplingParams:
    """The artifact's defaults under the flags that were given."""
    names = [flag[2:].replace("-", "_") for flag, *_ in SAMPLING]
    given = {name: getattr(args, name) for name in names}
    return llm.default_params(**given, seed=args.seed, stop=tuple(args.stop), **changes)
