"""qcc eval: how good a compiled model is, measured through its own library."""

from __future__ import annotations

import argparse

from qcc.compiler.cli._running import add_precision_argument
from qcc.runtime.errors import QccError

HELP = "measure a compiled model: perplexity, and KL divergence (or cosine) from the original"
EXAMPLE = """
qcc eval ./llama-q4 --text wiki.txt
qcc eval ./llama-q4 --against ./Llama-3.2-1B --text wiki.txt --json
qcc eval ./llama-q4 ./llama-q3 --against ./Llama-3.2-1B --text wiki.txt --html report.html
qcc eval ./llama-q3 --against ./Llama-3.2-1B --text wiki.txt --tensors
qcc eval ./llama-q4 --against ./Llama-3.2-1B --text wiki.txt --layers
qcc eval ./llama-q4 --against ./Llama-3.2-1B --text wiki.txt --activations --max-tokens 4000
qcc eval ./bge-q4 --against ./bge-base-en-v1.5 --text lines.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `eval`."""
    parser.add_argument(
        "artifacts", metavar="ARTIFACT", nargs="+", help="what qcc compile wrote; several: compared"
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        required=True,
        help="UTF-8 text, <|endoftext|> between documents",
    )
    parser.add_argument(
        "--against",
        metavar="MODEL",
        default=None,
        help="the checkpoint that it was compiled from; without it: perplexity alone",
    )
    parser.add_argument(
        "--reference",
        default="auto",
        choices=["auto", "transformers", "qcc"],
        help="what runs MODEL: transformers in fp32 (layer by layer if it is large), or our own "
        "q0f32 library; auto: transformers where it is installed",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=None,
        metavar="N",
        help="tokens of a window (default: the least context of the artifacts, at most 2048)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=None, metavar="N", help="only the first N tokens"
    )
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="measure each weight's share of the damage: a pass over a part of the text for each",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="show after which layer the activations depart from the original's: finds a wrong "
        "kernel",
    )
    parser.add_argument(
        "--activations",
        action="store_true",
        help="show what low precision costs beside float32 activations and an f32 KV cache: "
        "through prefill, and token by token (slow: bound it with --max-tokens)",
    )
    parser.add_argument(
        "--lora", default=None, metavar="DIR", help="PEFT adapter that was merged into MODEL"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, on the last line")
    parser.add_argument("--html", metavar="FILE", default=None, help="write a page with plots")
    parser.add_argument(
        "--store", action="store_true", help="keep the report in the artifact, for qcc show"
    )
    parser.add_argument(
        "--save-logits", metavar="F.npz", default=None, help="write both sides of every window"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read MODEL's pytorch_model.bin (weights_only)"
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: the cores)"
    )
    add_precision_argument(parser)
    parser.add_argument(
        "--kv",
        action="append",
        choices=("f32", "f16", "int8"),
        default=[],
        help="how the KV cache keeps keys and values (default: f16, f32 with --precision high); "
        "with --activations as often as you like: rows for each, the other figures by the first",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report as text or as JSON."""
    import json
    from pathlib import Path

    from qcc.compiler.cli import _embeddings
    from qcc.compiler.cli._evaluation import EvalOptions, check_store, evaluate, store
    from qcc.compiler.steps import Steps

    is_embedding = _embeddings.are_embeddings(args.artifacts)
    if is_embedding:
        _embeddings.check_flags(args)
    elif len(args.kv) > 1 and not args.activations:
        raise QccError("--kv: give it once, or with --activations")
    elif args.against is None:
        for flag, given in (("--tensors", args.tensors), ("--layers", args.layers)):
            if given:
                raise QccError(f"{flag} compares with the original: give it with --against MODEL")
        if args.store:
            for folder in args.artifacts:
                check_store(Path(folder))
    options = EvalOptions(
        against=args.against,
        reference=args.reference,
        context=args.context,
        max_tokens=args.max_tokens,
        save_logits=Path(args.save_logits) if args.save_logits else None,
        layers=args.layers,
        tensors=args.tensors,
        allow_pickle=args.allow_pickle,
        lora=Path(args.lora) if args.lora else None,
        threads=args.threads,
        precision=args.precision,
        kv=tuple(args.kv),
        activations=args.activations,
    )
    if is_embedding:
        found = _embeddings.agreement(args.artifacts, args.text, options, Steps())
        _embeddings.show(found, args.json)
        return 0
    report = evaluate(args.artifacts, args.text, options, Steps())
    if args.store:
        for index, folder in enumerate(args.artifacts):
            store(Path(folder), report, index)
    if args.html:
        from qcc.runtime.eval.page import write_page

        write_page(Path(args.html), report)
    if args.json:
        print(json.dumps(report.as_dict()))
    else:
        print("\n".join(report.lines()))
    return 0
