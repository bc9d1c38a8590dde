"""qcc tune: a format for each weight, by what each does to the logits, at a size that you name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qcc.runtime.errors import QccError

if TYPE_CHECKING:
    from qcc.compiler.weights.checkpoint import Checkpoint
    from qcc.compiler.weights.spec import WeightSpec
    from qcc.quant_schemes.format import WeightFormat

HELP = "find the mixed scheme that loses least at a given size"
EXAMPLE = """
qcc tune ./Llama-3.2-1B --target-bpw 4.25 -o tuned.yaml
qcc compile ./Llama-3.2-1B --quant tuned.yaml --method gptq -o ./llama-tuned
qcc tune ./Llama-3.2-1B --target-bytes 600M --calib mytext.txt -o tuned.yaml
qcc tune ./Llama-3.2-1B --target-bpw 3.5 --embedding 8/32 -o tuned.yaml
"""
FORMATS = "2/16s,2/16k,3/16s,3/16k,4/32s,4/32k,4/16k,5/32s,5/32k,6/32s,6/32k,8/row,8/32"
SMALL = 200_000_000  # weights; below, every pair of weight and format is measured, and the curve
PROBES = 3  # formats measured of a larger model
TOKENS = 2048
SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tune`."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, .gguf or hub id")
    parser.add_argument("-o", "--output", metavar="FILE", default="tuned.yaml", help="scheme file")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-bpw",
        type=float,
        metavar="B",
        help="bits a weight on average, scales included, of all weights that are tuned",
    )
    target.add_argument(
        "--target-bytes", metavar="N", help="bytes of all that is stored, as 600M or 1.5G"
    )
    parser.add_argument(
        "--formats",
        default=FORMATS,
        metavar="F,F,...",
        help="candidates, each bits/group as compile takes it (default: %(default)s)",
    )
    parser.add_argument("--embedding", metavar="FORMAT", help="fixed, not tuned")
    parser.add_argument("--lm-head", metavar="FORMAT", help="fixed, not tuned")
    parser.add_argument(
        "--fused", action="store_true", help="one format for q, k and v, and for gate and up"
    )
    parser.add_argument("--calib", default="self", metavar="self|FILE", help="text to measure on")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="of it, for each measurement"
    )
    parser.add_argument(
        "--curve",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure sizes from the least to the most (default: of models below 200M weights)",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin")


def run(args: argparse.Namespace) -> int:
    """Measure, allocate, write the scheme and the page."""
    from pathlib import Path

    from qcc.compiler.options import MIN_TOKENS
    from qcc.compiler.steps import Steps
    from qcc.compiler.tune.output import lines, page, scheme_data, scheme_text
    from qcc.runtime.files import write_file

    out = Path(args.output)
    if out.suffix not in (".yaml", ".yml"):
        raise QccError(f"-o {out}: a scheme file ends in .yaml")
    if not out.absolute().parent.is_dir():
        raise QccError(f"-o {out}: there is no folder {out.parent}")
    if args.tokens < MIN_TOKENS:
        raise QccError(f"--tokens {args.tokens}: must be {MIN_TOKENS} or more")
    tuning, fixed, tokens, text, method = _tune(args, Steps())
    bits = tuning.bits_per_weight(tuning.chosen)
    about = f"tuned for {Path(args.model).name}: {bits:.3f} bits a weight; measured on {tokens:,} "
    about += "tokens that the model sampled" if text.name == "self" else f"tokens of {text.name}"
    data = scheme_data(tuning, fixed, about, f"{text.name}, sha256 {text.sha256}")
    write_file(out, scheme_text(data))
    picture = out.with_suffix(".html")
    write_file(picture, page(tuning, f"qcc tune: {Path(args.model).name}", about))
    print("\n".join(lines(tuning)))
    print(f"\n{out}: {bits:.3f} bits a weight, KL {tuning.chosen.divergence:.5f}; {picture}: curve")
    print(f"use it: qcc compile {args.model} --quant {out}{method} -o DIR")
    return 0


def _tune(args: argparse.Namespace, steps: Any) -> Any:
    """(Tuning, scheme of what is not tuned, tokens that were measured on, their text, --method)."""
    from qcc.compiler.build import weight_specs
    from qcc.compiler.calibrate.text import text_of_file, text_of_model
    from qcc.compiler.cli._divergence import Divergence
    from qcc.compiler.cli._swap import SwappableModel
    from qcc.compiler.codes import why_no_text
    from qcc.compiler.driver import DEFAULT_CHUNK, make_plan, open_checkpoint
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.source import checksum, locate
    from qcc.compiler.tune.effects import measure_effects
    from qcc.compiler.tune.search import least_bits, tune
    from qcc.quant_schemes.rounding import mse

    source = locate(args.model, args.allow_pickle)
    options = CompileOptions(
        quant="q0f16",
        embedding=args.embedding,
        lm_head=args.lm_head,
        allow_pickle=args.allow_pickle,
    )
    with open_checkpoint(source, options) as checkpoint:
        plan = make_plan(source, options, DEFAULT_CHUNK)
        specs = weight_specs(plan)
        if plan.embedding is not None:
            raise QccError(f"{source}: an embedding model is not tuned: it has no logits")
        if args.lm_head is not None and all(spec.role != "lm_head" for spec in specs):
            raise QccError(
                "--lm-head: the model has no lm_head of its own, it multiplies by its embedding; "
                "give --embedding FORMAT"
            )
        fixed = {role for role in ("embedding", "lm_head") if getattr(args, role) is not None}
        units = _units(specs, checkpoint, fixed, args.fused)
        formats = _formats(args.formats, plan.scheme.dtype)
        weights = sum(unit.shape[0] * unit.shape[1] for unit in units)
        budget = _budget(args, weights, specs, {unit.name for unit in units})
        least_bits(units, formats, budget)  # an impossible target is refused before all else
        small = weights < SMALL
        context = min(plan.config.max_position_embeddings, 512)
        with steps.step("Read the text") as step:
            if args.calib == "self":
                text = text_of_model(
                    source, checksum(source), context, args.tokens, checkpoint=checkpoint
                )
            else:
                text = text_of_file(source, args.calib, context)
            step.note = text.name
        with steps.step("Load the original") as step:
            model = SwappableModel(args.model, steps, None, context, args.allow_pickle)
            divergence = Divergence(model, text.windows, args.tokens)
            step.note = f"{model.name}, {divergence.tokens:,} tokens for each measurement"
        probed = formats if small else formats[:: max(1, (len(formats) - 1) // (PROBES - 1))]
        with steps.step("Measure each weight"):
            effects = measure_effects(
                units,
                formats,
                probed,
                mse.quantize,
                divergence,
                lambda done, total: steps.count("Measure each weight", done, total, "measurements"),
            )
        with steps.step("Measure allocations"):
            found = tune(
                units,
                formats,
                effects,
                budget,
                mse.quantize,
                divergence,
                lambda done, total: steps.count("Measure allocations", done, total, "allocations"),
                small if args.curve is None else args.curve,
            )
    method = "" if why_no_text(specs) else " --method gptq"
    return found, plan.scheme, divergence.tokens, text, method


def _units(
    specs: tuple[WeightSpec, ...], checkpoint: Checkpoint, fixed: set[str], fused: bool
) -> list[Any]:
    """The weights that get a format of their own: the sources of a fused one, unless `fused`."""
    from functools import partial

    from qcc.compiler.calibrate.matrices import matrix_of
    from qcc.compiler.tune.effects import Unit

    found = []
    for spec in specs:
        if len(spec.shape) != 2 or spec.role not in {"linear", "embedding", "lm_head"} - fixed:
            continue
        if fused or spec.whole or spec.transform is not None or len(spec.sources) == 1:
            read = partial(matrix_of, spec, checkpoint.read)
            found.append(Unit(spec.name, (spec.shape[0], spec.shape[1]), spec.role, read))
            continue
        for source in spec.sources:
            read = partial(_as_float, checkpoint, source.name)
            found.append(Unit(source.name, (source.shape[0], source.shape[1]), spec.role, read))
    if not found:
        raise QccError("nothing to tune: every entry is fixed")
    return found


def _as_float(checkpoint: Checkpoint, name: str) -> Any:
    import numpy as np

    return checkpoint.read(name).astype(np.float32)


def _formats(text: str, dtype: str) -> list[WeightFormat]:
    """The candidates, fewest bits first."""
    from qcc.quant_schemes.format_text import format_of_text
    from qcc.quant_schemes.scheme import uniform_format

    found = [
        format_of_text(part.strip(), dtype, "--formats", uniform_format)
        for part in text.split(",")
        if part.strip()
    ]
    if any(fmt.is_float for fmt in found) or not found:
        raise QccError(f"--formats {text!r}: give quantized formats, as {FORMATS}")
    return sorted(dict.fromkeys(found), key=lambda fmt: fmt.bits_per_weight())


def _budget(
    args: argparse.Namespace, weights: int, specs: tuple[WeightSpec, ...], tuned: set[str]
) -> int:
    """Bits for the weights that are tuned."""
    from qcc.runtime.artifact import tensor_bytes

    if args.target_bytes is None:
        if not 1 <= args.target_bpw <= 16:
            raise QccError(f"--target-bpw {args.target_bpw:g}: must be from 1 to 16")
        return int(args.target_bpw * weights)
    text = args.target_bytes.strip().upper().removesuffix("B")
    factor = SUFFIXES.get(text[-1:], 1)
    try:
        wanted = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise QccError(
            f"--target-bytes {args.target_bytes!r}: a number of bytes, as 600M or 1.5G"
        ) from None
    others = sum(
        tensor_bytes(part.shape, part.dtype)
        for spec in specs
        if not tuned & {spec.name, *(source.name for source in spec.sources)}
        for part in spec.stored
    )
    if not others < wanted < 1e15:
        raise QccError(
            f"--target-bytes {args.target_bytes}: what is not tuned alone takes {others:,} bytes"
        )
    return int(8 * (wanted - others))
