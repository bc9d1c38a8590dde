"""--dump-ir: one file a pass from the quantization on, every kernel once."""

from qcc.compiler.driver import compile_model
from qcc.compiler.options import CompileOptions
from qcc.targets.spec import BuildOptions


def test_every_pass_and_every_kernel_is_written(checkpoint, tmp_path):
    """The first file still multiplies by a dequantized weight, a later one calls the kernel."""
    dump = tmp_path / "ir"
    model = checkpoint("llama", num_hidden_layers=1)
    options = CompileOptions(dump_ir=dump, build=BuildOptions(precision="high"))
    compile_model(str(model), tmp_path / "out", options)
    names = [path.name for path in sorted(dump.glob("*-*.txt"))]
    assert names[0] == "001-QuantizeWeights.txt"
    order = [name.split("-", 1)[1].removesuffix(".txt") for name in names]
    assert order.index("LowerLinear") < order.index("HoistRepack") < order.index("FuseTIR")
    assert "R.matmul" in (dump / names[0]).read_text()
    after = next(dump.glob("*-HoistRepack.txt")).read_text()
    assert "R.matmul" not in after and "gemv" in after
    assert (dump / "kernels" / "gemv.txt").is_file()
    assert len((dump / "times.txt").read_text().splitlines()) == len(names)
