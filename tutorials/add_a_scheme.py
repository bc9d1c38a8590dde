"""Tutorial 3: write a scheme of your own, in which some weights get more bits than others.

    python -m qcc.tutorials.add_a_scheme        # the bundled model, some seconds

A scheme is a YAML file; `SCHEME` below is one, with every key explained. FORMAT is what stands
behind the colons, on the command line the same as in a file:

    4/32      bits/group: 4-bit codes, a scale for each 32 columns of a row, symmetric around 0
    4/32a     asymmetric: a scale and a bias for each group
    2/16k     asymmetric, two-level: the scales and biases of a block of 256 columns are small codes
              themselves, so that groups can be small; 2/32k6 names the bits of the scales
    4/32s     symmetric, two-level
    8/row     a scale a row ("per channel"); 8/tensor: one for all
    q8f16_1   as the matrices of a shipped scheme that has no rules
    float     not quantized: numbers of the scheme's dtype
    {bits: 4, group: 32, grid: asymmetric, scale_bits: 6}     4/32k, key by key; further keys are
              layout (NK or KN), zero (the code that stands for 0), dtype (of the scales)

bits are 2, 3, 4, 5, 6 or 8; a group is a multiple of 8 from 8 to 1024, one that divides 256 if its
scales are two-level. FORMATS.md in this folder says how each is stored, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from qcc.compiler import CompileOptions, compile_model
from qcc.compiler.build import weight_specs
from qcc.compiler.cli._evaluation import EvalOptions, evaluate
from qcc.compiler.driver import DEFAULT_CHUNK, make_plan
from qcc.compiler.source import locate
from qcc.compiler.steps import Steps
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format_text import text_of
from qcc.runtime import LLM, SamplingParams
from qcc.runtime.eval.report import Report
from qcc.targets.spec import BuildOptions
from qcc.tutorials.tiny import HELDOUT, MODEL_DIR

SCHEME = """\
description: 4 bits, more where it hurts
dtype: float16                      # of scales, and of norms and biases
linear: 4/32k                       # every matrix that no rule matches
rules:                              # shell wildcards on names; the first that matches wins
  "model.layers.0.*.weight": 6/32k  # so v_proj of layer 0 has 6 bits, not 5
  "*.v_proj.weight": 5/32k
  "*.down_proj.weight": {bits: 5, group: 32, grid: asymmetric, scale_bits: 6}
embedding: 8/32                     # the table of tokens; no rule reaches these two
lm_head: 8/row                      # of a model whose lm_head is a weight of its own
activations: none                   # dynamic, static: round the inputs of matrices to int8
method: mse                         # how codes are chosen, unless --method says otherwise
"""
# The same without a file: qcc compile MODEL --quant q4f16_k --embedding 8/32, a --set for each of
# these, and --lm-head 8/row where the lm_head is not the embedding once more, as it is here.
RULES = (
    ("model.layers.0.*.weight", "6/32k"),
    ("*.v_proj.weight", "5/32k"),
    ("*.down_proj.weight", "5/32k"),
)
# Rules that are refused, with the reason.
REFUSED = ("*.vproj.weight", "*norm.weight", "model.embed_tokens.*")
SHOWN = ("embed", ".layers.0.", ".layers.1.")
TOKENS = 4000  # to evaluate on, few for the tutorial's sake


def main() -> None:
    """Run the tutorial."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tutorial(Path(folder))


def tutorial(out: Path) -> Report:
    """Write mixed.yaml into `out`, compile the bundled model with it, run and measure it."""
    # 1. A file of yours, anywhere; its name is the scheme's name. Copied into
    # quant_schemes/schemes/ it ships with qcc: `--quant mixed` finds it, and so does
    # `qcc list schemes`.
    file = out / "mixed.yaml"
    file.write_text(SCHEME, encoding="utf-8")
    print(f"1. A scheme\n\n{SCHEME}")

    # 2. qcc show MODEL --quant mixed.yaml
    # A weight is known by its name in the checkpoint. q, k and v are computed as one matrix,
    # qkv_proj; where they get different formats they are stored apart, and a rule may also name
    # the whole: "*.qkv_proj.weight". Streams of codes end at a whole word of 32 bits, so short
    # rows cost a little more than the format says.
    print("2. What it makes of the model")
    options = CompileOptions(quant=str(file))
    specs = planned(options)
    for line in sizes(specs):
        print(f"   {line}")

    # 3. qcc compile MODEL --quant q4f16_k --set '*.v_proj.weight=5/32k' --embedding 8/32 ...
    print("\n3. The same with --set")
    same = CompileOptions(quant="q4f16_k", rules=RULES, embedding="8/32")
    alike = [spec.format for spec in planned(same)] == [spec.format for spec in specs]
    print(f"   every weight has the same format: {'yes' if alike else 'NO'}")
    print("\n4. What is refused")
    for rule in REFUSED:
        try:
            planned(CompileOptions(rules=((rule, "8/32"),)))
        except SchemeError as err:
            print(f"   --set '{rule}=8/32': {err}")

    # 5. qcc compile MODEL --quant mixed.yaml -o ARTIFACT; qcc generate; qcc eval
    # Here with --precision high: a library that computes in float32 only takes half the time.
    print("\n5. Compile, run, measure")
    compiling = replace(options, build=BuildOptions(precision="high"))
    artifact = compile_model(str(MODEL_DIR), out / "artifact", compiling, Steps())
    (story,) = LLM(artifact).generate(
        "Once upon a time, there was", SamplingParams(temperature=0, max_tokens=24)
    )
    print(f"   Once upon a time, there was{story.text} ...")
    against = EvalOptions(against=str(MODEL_DIR), context=128, max_tokens=TOKENS)
    report = evaluate([artifact], HELDOUT, against, Steps())
    kl = report.evaluations[0].figures.kl
    assert kl is not None, "there is a reference"
    print(f"   KL divergence from the original: {kl['mean']:.5f} +- {kl['se']:.5f} nats")
    print("   (python -m qcc.tutorials.which_bits says what that means)")
    return report


def planned(options: CompileOptions) -> tuple[WeightSpec, ...]:
    """The bundled model's weights with the formats that a scheme gives them.

    Raises:
        SchemeError: no such scheme, an impossible format, a rule that matches nothing.
    """
    return weight_specs(make_plan(locate(str(MODEL_DIR)), options, DEFAULT_CHUNK))


def sizes(specs: tuple[WeightSpec, ...]) -> list[str]:
    """Format and bits a weight of two layers' weights and the embedding; the bits of all."""
    lines, bits, count = [], 0.0, 0
    for spec in specs:
        n, k = spec.shape if len(spec.shape) == 2 else (1, *spec.shape)
        bits += n * k * spec.format.bits_per_weight(n, k)
        count += n * k
        if spec.role != "float" and any(part in spec.name for part in SHOWN):
            lines.append(
                f"{spec.name:<42}{text_of(spec.format):<8}"
                f"{spec.format.bits_per_weight(n, k):6.3f} bits"
            )
    return [*lines, f"{'all of it, norms included':<50}{bits / count:6.3f} bits a weight"]


if __name__ == "__main__":
    main()
