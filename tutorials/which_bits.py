"""Tutorial 2: which bits do I need? Compile a model at several sizes, measure what each costs.

    python -m qcc.tutorials.which_bits                              # the bundled model
    python -m qcc.tutorials.which_bits --model ./Llama-3.2-1B --text my.txt --max-kl 0.05

It leaves an artifact for each size and one page, report.html, that shows them side by side. gptq
needs torch and transformers (`pip install '.[calibrate]'`); without them that row is left out, and
the reference is our own q0f32 library. Each step names the command line that does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qcc.compiler import CompileOptions, compile_model
from qcc.compiler.cli._evaluation import EvalOptions, evaluate
from qcc.compiler.options import Calibration
from qcc.compiler.reference import available
from qcc.compiler.sizes import SizeFlags
from qcc.compiler.steps import Steps
from qcc.runtime.eval.page import write_page
from qcc.runtime.eval.report import Report
from qcc.targets.spec import BuildOptions
from qcc.tutorials.tiny import HELDOUT, MODEL_DIR

# (scheme, method), None: the scheme's own, which needs no text.
SIZES: tuple[tuple[str, str | None], ...] = (
    ("q8f16_1", None),
    ("q4f16_k", None),
    ("q3f16_k", None),
    ("q2f16_k", None),
    ("q2f16_k", "gptq"),
)
# Few, for the tutorial's sake: the default is 65536 to calibrate and all of the text to measure.
CALIBRATION_TOKENS, MAX_TOKENS = 2048, 4000

FIGURES = """
   bits        bits a weight of all that is stored: codes, scales, embedding, norms; linear: of the
               matrices alone
   KL          how far the probabilities of the next token are from the original's: the mean over
               all positions, in nats. 0 is the same model. Two artifacts differ for certain only
               if their means are several standard errors (se) apart. p99: 1 position in 100 is
               worse than this
   top-1       at how many positions the likeliest token is the original's: what greedy text shows
   perplexity  how well the text is predicted. It may stay or even fall while the model changes:
               errors for the better and for the worse cancel. So trust the KL divergence, and keep
               perplexity for comparing different models"""

BITS = """
   8  q8f16_1, q8f16_c   the nearest to the original
   6  q6f16_1            where 4 bits lose more than you accept, and 8 are too large
   5  q5f16_1            likewise
   4  q4f16_k            begin here; q4f16_1 if other programs shall read the files
   3  q3f16_k            if 4 bits do not fit: with gptq, and measured
   2  q2f16_k            if 3 do not: with gptq; measure a smaller model at 4 bits as well
   A scheme that ends in m (q4f16_km) gives more bits to the matrices that need them most.
   Models differ in what they lose: take no figure from another model."""

METHODS = """
   rtn   rounds to nearest; the default of the names that other programs know, as q4f16_1
   mse   searches each group's scale for the least squared error; the default of the others
   hqq   heeds outliers less than mse
   imse  mse, but columns with large inputs count more               needs a little text
   awq   scales columns with large inputs up before it rounds        needs a little text
   gptq  chooses each code knowing the errors of those before it     needs a little text; slowest
   They write the same formats: a method costs nothing when the model runs. The text is sampled
   from the model itself, or it is yours (--calib FILE). Far too little of it makes things worse
   than no text at all. Do not calibrate on the text that you evaluate on: the figures would be
   too good, and qcc eval warns."""

COMMANDS = """
   MODEL={model}
   qcc compile $MODEL --quant q4f16_k --method gptq --calib my.txt -o ./mine
   qcc eval ./mine --against $MODEL --text other.txt --html mine.html
   qcc eval ./mine --against $MODEL --text other.txt --tensors  # which weights do the damage
   qcc tune $MODEL --target-bpw 4.25 -o tuned.yaml              # gives those more bits
   qcc compile $MODEL --quant tuned.yaml --method gptq -o ./tuned"""


def main() -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL_DIR), help="checkpoint (default: bundled)")
    parser.add_argument(
        "--text", type=Path, default=HELDOUT, help="what to measure on (default: the bundled one)"
    )
    parser.add_argument("--out", type=Path, default=Path("which-bits"), help="folder to write")
    parser.add_argument("--max-kl", type=float, default=0.02, help="what you accept, in nats")
    args = parser.parse_args()
    tutorial(args.model, args.text, args.out, args.max_kl)


def tutorial(model: str, text: Path, out: Path, max_kl: float = 0.02) -> Report:
    """Compile, measure and explain; leaves the artifacts and report.html in `out`."""
    # 1. qcc compile MODEL --quant SCHEME [--method gptq] --context-window 128 --precision high
    #    -o OUT/NAME
    # The short context is for speed, and so is a library that computes in float32 only: the weights
    # alone make the figures. Leave both flags out for an artifact that you mean to use.
    print("1. Compile at several sizes")
    artifacts = []
    for scheme, method in SIZES:
        if method is not None and not available():
            print(f"   no {method}: it needs torch and transformers: pip install '.[calibrate]'")
            continue
        name = scheme if method is None else f"{scheme}-{method}"
        print(f"   {name}")
        compiling = CompileOptions(
            quant=scheme,
            method=method,
            sizes=SizeFlags(context_window=128, max_batch=1),
            build=BuildOptions(precision="high"),
            calibration=Calibration("self", CALIBRATION_TOKENS),
            force=True,
        )
        artifacts.append(compile_model(model, out / name, compiling, Steps(sys.stdout)))

    # 2. qcc eval OUT/q* --against MODEL --text TEXT --max-tokens 4000 --html OUT/report.html
    # Every artifact runs through its own compiled library, against the original in fp32.
    print("\n2. Measure them side by side")
    options = EvalOptions(against=model, max_tokens=MAX_TOKENS)
    report = evaluate(artifacts, text, options, Steps(sys.stdout))
    page = out / "report.html"
    write_page(page, report)
    print(table(report))
    print(f"   the page with plots: {page}")

    print(f"\n3. What the figures say\n{FIGURES}\n\n   Here:")
    for line in findings(report, max_kl):
        print(f"   {line}")
    print(f"\n4. How many bits\n{BITS}\n\n5. How codes are chosen\n{METHODS}")
    print(f"\n6. Your own model and text\n{COMMANDS.format(model=model)}")
    return report


def table(report: Report) -> str:
    """The figures, a line an artifact."""
    lines = [
        f"   {'artifact':<16}{'bits':>6}{'linear':>8}{'MB':>8}{'KL':>10}{'se':>9}{'p99':>8}"
        f"{'top-1':>8}{'perplexity':>12}"
    ]
    for item in report.evaluations:
        figures = item.figures
        assert figures.kl is not None and figures.top1 is not None, "there is a reference"
        lines.append(
            f"   {Path(item.artifact).name:<16}{item.bits_per_weight:6.2f}"
            f"{item.linear_bits or 0:8.2f}{item.stored_bytes / 1e6:8,.1f}"
            f"{figures.kl['mean']:10.5f}{figures.kl['se']:9.5f}{figures.kl['p99']:8.3f}"
            f"{figures.top1:8.1%}{figures.perplexity:12.4f}"
        )
    original = report.evaluations[0].figures.reference_perplexity
    return "\n".join([*lines, f"   {'the original':<16}{original:>69.4f}"])


def findings(report: Report, max_kl: float) -> list[str]:
    """What this report says, in words: differing tokens, and the smallest that is good enough."""
    lines, fitting = [], []
    for item in report.evaluations:
        name, figures = Path(item.artifact).name, item.figures
        original = figures.reference_perplexity
        assert figures.kl and figures.top1 is not None and original, "there is a reference"
        differ = 1 - figures.top1
        often = f"1 position in {1 / differ:,.0f}" if differ else "no position"
        line = f"{name}: another likeliest token at {often}"
        if figures.perplexity < original:
            line += "; yet its perplexity is below the original's"
        lines.append(line)
        # Two standard errors: a mean this close to the bound is not known to be below it.
        if figures.kl["mean"] + 2 * figures.kl["se"] <= max_kl:
            fitting.append((item.bits_per_weight, name))
    if not fitting:
        return [*lines, f"none has a KL divergence below {max_kl:g} nats (--max-kl)"]
    bits, name = min(fitting)
    least = f"the smallest with a KL divergence below {max_kl:g} nats (--max-kl) is {name}"
    return [*lines, f"{least}, {bits:.2f} bits a weight"]


if __name__ == "__main__":
    main()
