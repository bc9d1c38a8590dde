"""qcc.compiler.cli: the command line, one file a verb.

A verb's file defines HELP (one line), EXAMPLE, `add_arguments(parser)` and `run(args) -> int`, and
imports only the standard library at module level; discovery lists this folder. Here: the listing,
the dispatch, and what a user sees of an error. Beware: `list` and `compile` are verbs, so in this
module these names become submodules as soon as they are imported.
"""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qcc.quant_schemes.errors import SchemeError, did_you_mean
from qcc.runtime.errors import QccError

ORDER = (
    *("quickstart", "compile", "convert", "package", "generate", "chat", "embed", "eval", "tune"),
    *("bench", "show", "list", "doctor"),
)
# Errors of the operating system that are the user's business and not a bug of ours.
USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each default and, where a metavar hides them, the choices."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """The option's help with its choices and default appended."""
        text = action.help or ""
        if action.choices is not None and action.metavar is not None and "choices" not in text:
            text += f" (one of: {', '.join(map(str, action.choices))})"
        shown = action.default not in (None, False, argparse.SUPPRESS, [], ())
        takes_value = bool(action.option_strings) or action.nargs in ("?", "*")
        if shown and takes_value and "default" not in text:
            text += " (default: %(default)s)"
        return text


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and name the closest flag."""

    def __init__(self, **options: Any) -> None:
        """Set the formatter; no abbreviations: a misspelt flag is an error, never a guess."""
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_all(self, args: Sequence[str]) -> argparse.Namespace:
        """parse_args, but an unknown flag gets a "did you mean"."""
        # Intermixed: else an optional positional behind a flag is not found.
        parsed, extra = self.parse_known_intermixed_args(args)
        if extra:
            flags = [word for word in extra if word.startswith("-")]
            word = (flags or extra)[0]
            guess = did_you_mean(word.split("=")[0], self._option_string_actions)
            what = "option" if flags else "argument"
            self.error(f"unknown {what} {word}{guess}")
        return parsed


def verbs() -> tuple[str, ...]:
    """Names of the verbs whose file exists, in the order of the listing."""
    found = {path.stem for path in Path(__file__).parent.glob("*.py") if path.stem[0] != "_"}
    return (*(name for name in ORDER if name in found), *sorted(found.difference(ORDER)))


def verb_help(name: str) -> str:
    """The HELP line of a verb, read from its source: the listing imports no verb."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
            return str(ast.literal_eval(node.value))
    raise AssertionError(f"compiler/cli/{name}.py defines no HELP")


def version_line() -> str:
    """The versions of qcc and of the TVM wheels that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    return f"qcc {of('qcc')} (apache-tvm {of('apache-tvm')}, apache-tvm-ffi {of('apache-tvm-ffi')})"


def verb_parser(name: str) -> tuple[Parser, Any]:
    """The parser of a verb, and its module."""
    module = importlib.import_module(f"{__name__}.{name}")
    example = "\n".join(f"  {line.strip()}" for line in module.EXAMPLE.strip().splitlines())
    parser = Parser(prog=f"qcc {name}", description=module.HELP, epilog=f"example:\n{example}")
    module.add_arguments(parser)
    return parser, module


def top_parser(names: Iterable[str]) -> Parser:
    """The parser of what stands before the verb; its help lists the verbs."""
    width = max(map(len, names), default=0)
    listing = "\n".join(f"  {name:<{width}}  {verb_help(name)}" for name in names)
    parser = Parser(
        prog="qcc",
        usage="qcc [--version] VERB ...",
        description="A compiler for large language models: "
        "Hugging Face checkpoint in, fast quantized library out.",
        epilog=f"verbs:\n{listing}\n\nqcc VERB --help shows a verb's options and an example.",
    )
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    return parser


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line; usage errors leave as SystemExit, a user's mistakes as QccError."""
    names = verbs()
    if not argv or argv[0].startswith("-"):
        parser = top_parser(names)
        if parser.parse_all(argv[:1]).version:
            print(version_line())
            return 0
        parser.print_help(sys.stderr)
        return 2
    verb = argv[0]
    if verb not in names:
        raise QccError(
            f"unknown verb {verb!r}{did_you_mean(verb, names)}; verbs: {', '.join(names)}"
        )
    parser, module = verb_parser(verb)
    return int(module.run(parser.parse_all(argv[1:])) or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """The `qcc` command: returns the exit status.

    0 done, 1 the verb's own no, 2 a user's mistake, 130 interrupted, 141 the reader of a pipe left.
    QCC_TRACEBACK=1 shows the traceback behind an error's one line.
    """
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except (QccError, SchemeError) as err:
        return _fail(" ".join(str(err).split()))
    except KeyboardInterrupt:
        print("\nqcc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Else the interpreter complains when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as err:
        if err.errno not in USER_ERRNOS:
            raise
        where = f"{err.filename}: " if err.filename else ""
        return _fail(f"{where}{err.strerror}")
    except SystemExit as err:
        return err.code if isinstance(err.code, int) else int(err.code is not None)


def _fail(message: str) -> int:
    """Print an error's one line (after its traceback, if asked for); the status is 2."""
    if os.environ.get("QCC_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
    print(f"qcc: error: {message}", file=sys.stderr)
    return 2
