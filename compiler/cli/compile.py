"""qcc compile: a checkpoint into an artifact folder with a library for each target."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qcc.compiler.options import CompileOptions
    from qcc.compiler.steps import Steps

HELP = "compile a checkpoint into a library and quantized weights"
EXAMPLE = """
qcc compile ./Llama-3.2-1B --quant q4f16_1 --target cpu -o ./llama-q4
qcc compile ./Llama-3.2-1B --quant q3f16_k --method gptq -o ./llama-q3
qcc compile ./Llama-3.2-1B --quant q4f16_a32 --set '*.v_proj.*=6/32a' --embedding 8/32 -o ./mixed
"""
# The same text as quant_schemes.format_text.FORMAT_HELP, which the help cannot import in time.
FORMAT_HELP = (
    "FORMAT is bits/group: 4/32, 4/64a (asymmetric), 2/16k (two-level scales), 8/row, 8/tensor; "
    "or a uniform scheme's name, as q8f16_1; or float"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compile`; `convert` shares those about the model and its sizes."""
    add_model_arguments(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        metavar="T[,T...]",
        help="cpu, webgpu (browsers), vulkan; a library each (qcc list targets)",
    )
    parser.add_argument(
        "--mcpu",
        default="native",
        metavar="P[,P...]",
        help="processor as LLVM names it: native, x86-64-v3 (AVX2: runs anywhere modern), "
        "icelake-server, cortex-a76, ...; of several, as x86-64-v3,native, a library each, and the "
        "runtime takes the best that a machine runs (default: native)",
    )
    parser.add_argument(
        "--triple", default=None, help="cross compile, as aarch64-unknown-linux-gnu"
    )
    parser.add_argument(
        "--opt",
        default="O2",
        choices=["O0", "O1", "O2", "O3"],
        help="O0: generic schedules only; O1: our kernels; O2: and fusion; O3: and slow work when "
        "linking, for a smaller wasm",
    )
    parser.add_argument(
        "--precision",
        default="both",
        choices=["both", "high"],
        help="high: a smaller library that only computes in float32; both: running chooses",
    )
    parser.add_argument(
        "--eval",
        metavar="TEXT",
        default=None,
        help="measure the artifact on a text, against MODEL, and keep the report in it (qcc show); "
        "of an embedding model: compare its vectors of each line, and keep nothing",
    )
    parser.add_argument("--dump-ir", metavar="DIR", default=None, help="write the IR of every pass")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, -o, the scheme and the sizes."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or hub id org/name")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="artifact folder")
    parser.add_argument(
        "--task",
        default="auto",
        choices=["auto", "generation", "embedding"],
        help="what the model is for; auto: embedding for encoders, for classes without a head, as "
        "MistralModel, and where modules.json is there "
        "(default: auto)",
    )
    add_scheme_arguments(parser)
    sizes = parser.add_argument_group("sizes (tokens)")
    for flag, text in (
        (
            "--context-window",
            "longest prompt + answer (default: the model's, at most 8192); "
            "no bound with a sliding window; of an embedding model: its longest text, at most 2048",
        ),
        ("--sliding-window", "attend to the last N tokens only (default: the model's)"),
        ("--attention-sink", "first tokens that a sliding window keeps (default: 0)"),
        ("--prefill-chunk", "tokens computed at once (default: 512; embedding models: the window)"),
        ("--max-batch", "sequences at once (default: 4; texts to embed: 32)"),
    ):
        sizes.add_argument(flag, type=int, default=None, metavar="N", help=text)
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin (weights_only)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace another artifact in the folder"
    )


def add_scheme_arguments(parser: argparse.ArgumentParser) -> None:
    """How weights are stored, and how their codes are chosen."""
    scheme = parser.add_argument_group("quantization", FORMAT_HELP)
    scheme.add_argument(
        "--quant",
        default=None,
        metavar="SCHEME",
        help="scheme name (qcc list schemes) or YAML file (default: q4f16_1; for a model that is "
        "quantized already, its own codes)",
    )
    scheme.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="RULE=FORMAT",
        help="format of the weights whose names match a wildcard, as '*.v_proj.*=6/32a'; "
        "repeatable, the first that matches wins",
    )
    scheme.add_argument("--embedding", metavar="FORMAT", help="format of the token embedding")
    scheme.add_argument("--lm-head", metavar="FORMAT", help="format of an lm_head of its own")
    scheme.add_argument(
        "--method",
        default=None,
        metavar="M",
        help="how codes are chosen: rtn, mse, hqq without text; imse, awq, gptq with a little "
        "(default: the scheme's; qcc list methods)",
    )
    scheme.add_argument(
        "--calib",
        default="self",
        metavar="self|FILE",
        help="text for imse, awq, gptq and static activations: a file, or sampled from the model "
        "(default: self)",
    )
    scheme.add_argument(
        "--calib-tokens",
        type=int,
        default=None,
        metavar="N",
        help="tokens of it (default: 65536; 16384 from 100M weights on)",
    )
    scheme.add_argument("--lora", default=None, metavar="DIR", help="PEFT adapter to merge first")


def run(args: argparse.Namespace) -> int:
    """Compile and say what was made."""
    from pathlib import Path

    from qcc.compiler.driver import compile_model
    from qcc.compiler.steps import Steps
    from qcc.runtime.errors import QccError
    from qcc.runtime.eval.protocol import read_text
    from qcc.runtime.manifest import read_manifest
    from qcc.targets.spec import BuildOptions

    targets = tuple(name.strip() for name in args.target.split(",") if name.strip())
    if not targets:
        raise QccError("--target: no target named (qcc list targets)")
    options = model_options(
        args,
        targets=targets,
        build=BuildOptions(args.mcpu, args.triple, int(args.opt[1:]), args.precision),
        dump_ir=Path(args.dump_ir) if args.dump_ir else None,
    )
    steps = Steps()
    if args.eval:  # a compile takes long: what is wrong with this shall come first
        read_text(args.eval)
        _check_eval(args)
    out = compile_model(args.model, Path(args.output), options, steps)
    if args.eval:
        measure(out, args, steps)
    is_embedding = read_manifest(out).get("task") == "embedding"
    for command in _commands(out, targets, is_embedding):
        print(f"{out}: run it with `qcc {command}`")
    return 0


def _commands(out: Path, targets: Sequence[str], is_embedding: bool) -> list[str]:
    """What runs the libraries that were made."""
    verb = f'generate {out} "Once upon a time"'
    if is_embedding:
        verb = f'embed {out} "a text" "another"'
    found = []
    if "cpu" in targets:
        found.append(verb)
    elif "vulkan" in targets:
        found.append(f"{verb} --device vulkan")
    if "webgpu" in targets:
        found.append(f"package web {out} -o {out}-web --serve")
    return found


def _check_eval(args: argparse.Namespace) -> None:
    """Refuse --eval where it would fail behind the compile."""
    from qcc.compiler.read_model import read_model
    from qcc.compiler.source import locate
    from qcc.runtime.errors import QccError

    if not args.lora:
        return
    *_, embedding = read_model(locate(args.model, args.allow_pickle), args.task)
    if embedding is not None:
        raise QccError("--eval of an embedding model with --lora is not implemented")


def measure(out: Path, args: argparse.Namespace, steps: Steps) -> None:
    """Evaluate an artifact against the model it was made of; print the report.

    The artifact keeps it, but for an embedding model's.
    """
    from pathlib import Path

    from qcc.compiler.cli._embeddings import agreement, are_embeddings, show
    from qcc.compiler.cli._evaluation import EvalOptions, evaluate, store

    lora = Path(args.lora) if args.lora else None
    options = EvalOptions(against=args.model, allow_pickle=args.allow_pickle, lora=lora)
    if are_embeddings([out]):
        show(agreement([out], args.eval, options, steps), as_json=False)
        return
    report = evaluate([out], args.eval, options, steps)
    store(out, report)
    print("\n".join(report.lines()))


def model_options(args: argparse.Namespace, **others: Any) -> CompileOptions:
    """CompileOptions of parsed arguments."""
    from pathlib import Path

    from qcc.compiler.options import Calibration, CompileOptions
    from qcc.compiler.sizes import SizeFlags

    sizes = SizeFlags(
        args.context_window,
        args.sliding_window,
        args.attention_sink,
        args.prefill_chunk,
        args.max_batch,
    )
    return CompileOptions(
        quant=args.quant,
        sizes=sizes,
        allow_pickle=args.allow_pickle,
        force=args.force,
        rules=tuple(map(_rule, args.set)),
        embedding=args.embedding,
        lm_head=args.lm_head,
        method=args.method,
        calibration=Calibration(args.calib, args.calib_tokens),
        lora=Path(args.lora) if args.lora else None,
        task=args.task,
        **others,
    )


def _rule(text: str) -> tuple[str, str]:
    """RULE=FORMAT; a wildcard may hold a sign of equality, a FORMAT does not."""
    from qcc.runtime.errors import QccError

    pattern, found, value = text.rpartition("=")
    if not (pattern and found and value):
        raise QccError(f"--set {text!r}: it takes RULE=FORMAT, as '*.v_proj.*=6/32a'")
    return pattern, value
