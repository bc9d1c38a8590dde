"""qcc embed: a vector of each text, and how alike the texts are."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcc.compiler.cli._running import (
    add_precision_argument,
    add_weights_argument,
    artifact_folder,
    shown_progress,
    text_lines,
)
from qcc.runtime.errors import QccError

if TYPE_CHECKING:
    from qcc.runtime.engine.embedder import Embedder

HELP = "make a vector of each text with an embedding model, and compare them"
EXAMPLE = """
qcc embed ./bge-q8 "a cat on a mat" "a kitten on a rug" "tax law"
qcc embed ./qwen3-embedding-q8 --prompt query "How tall is the Eiffel Tower?" --json
qcc embed ./bge-q8 --file lines.txt --npy vectors.npy
"""
TABLE = 12  # texts whose table is printed without being asked for
LABEL = 40  # characters of a text beside its row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the verb's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="artifact, or a checkpoint (compiled on first use)"
    )
    parser.add_argument("texts", metavar="TEXT", nargs="*", default=[], help="a text")
    parser.add_argument(
        "--file",
        metavar="LINES",
        default=None,
        help="a text on each line, blank lines left out; -: standard input",
    )
    parser.add_argument(
        "--prompt",
        metavar="NAME",
        default=None,
        help="which of the model's prompts goes before each text, as query (default: the model's)",
    )
    parser.add_argument(
        "--dimensions",
        type=int,
        default=None,
        metavar="N",
        help="only the first N numbers of each vector, made one of length 1 again",
    )
    parser.add_argument(
        "--no-truncate", action="store_true", help="refuse texts longer than the model's window"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with the vectors"
    )
    parser.add_argument("--npy", metavar="OUT", default=None, help="write them as float32[b, N]")
    parser.add_argument(
        "--similarity",
        action="store_true",
        help=f"show the cosine of each two texts (without it: of up to {TABLE} texts, where "
        "nothing else is asked for)",
    )
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="cpu", help="target, or name of one library")
    running.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: the cores)"
    )
    add_precision_argument(running)
    add_weights_argument(running)


def run(args: argparse.Namespace) -> int:
    """Embed the texts; print or write what was asked for."""
    texts = read_texts(args)
    folder = artifact_folder(args.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        from qcc.runtime.engine.embedder import Embedder, similarities

        embedder = Embedder(
            folder, args.device, args.threads, shown_progress(), args.precision, args.weights
        )
        vectors = embedder.embed(texts, args.prompt, not args.no_truncate, args.dimensions)
    for warning in caught:
        print(f"qcc: warning: {warning.message}", file=sys.stderr)
    alone = not (args.json or args.npy)
    shows = args.similarity or (alone and 1 < len(texts) <= TABLE)
    cosines = similarities(vectors) if shows else None
    if args.npy:
        _write(Path(args.npy), vectors)
    if args.json:
        print(json.dumps(_facts(embedder, args, texts, vectors, cosines), ensure_ascii=False))
        return 0
    count, width = vectors.shape
    where = f" in {args.npy}" if args.npy else ""
    print(f"{count} {'vector' if count == 1 else 'vectors'} of {width} numbers{where}")
    if cosines is not None:
        print("\n".join(_table(texts, cosines)))
    elif alone:
        for text, vector in zip(texts[:TABLE], vectors, strict=False):
            numbers = ", ".join(f"{x:.4f}" for x in vector[:4])
            print(f"  [{numbers}{', ...' if width > 4 else ''}]  {_label(text)}")
        if count > TABLE:
            print("  ...; --json or --npy OUT gives all of them")
    return 0


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of the command line and of the file, blank lines left out.

    Raises:
        QccError: none at all, or what is no UTF-8 text.
    """
    texts = list(args.texts)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise QccError("a text is not UTF-8") from err
    if args.file is not None:
        try:
            raw = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
            texts += text_lines(raw.decode("utf-8"))
        except UnicodeDecodeError as err:
            raise QccError(f"--file {args.file}: not UTF-8 text: {err.reason}") from err
        except OSError as err:
            raise QccError(f"--file {args.file}: cannot read: {err.strerror}") from err
    if not texts:
        raise QccError("no text: give TEXT ..., or --file LINES")
    return texts


def _write(path: Path, vectors: Any) -> None:
    import numpy as np

    try:
        with path.open("wb") as file:
            np.save(file, vectors)
    except OSError as err:
        raise QccError(f"--npy {path}: cannot write: {err.strerror}") from err


def _facts(
    embedder: Embedder, args: argparse.Namespace, texts: list[str], vectors: Any, cosines: Any
) -> dict[str, Any]:
    """What --json prints; the vectors are in a file where --npy names one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said before
        tokens = [len(ids) for ids in embedder.tokenize(texts, args.prompt)]
    facts: dict[str, Any] = {"texts": texts, "tokens": tokens, "dimensions": vectors.shape[1]}
    if args.npy:
        facts["npy"] = args.npy
    else:
        facts["embeddings"] = vectors.tolist()
    if cosines is not None:
        facts["similarity"] = cosines.round(6).tolist()
    return facts


def _table(texts: list[str], cosines: Any) -> list[str]:
    """The cosine of each two texts; the texts beside their rows."""
    numbers = range(1, len(texts) + 1)
    lines = ["cosine" + "".join(f"{i:>7}" for i in numbers)]
    for i, (text, row) in enumerate(zip(texts, cosines, strict=True), 1):
        lines.append(f"{i:>6}" + "".join(f"{x:7.3f}" for x in row) + f"   {_label(text)}")
    return lines


def _label(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= LABEL else f"{line[: LABEL - 3]}..."
