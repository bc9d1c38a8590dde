"""Linked wasm libraries under node without a GPU, in the JavaScript of stock WebLLM.

The runtime is built where the user's cache lacks it, which takes two minutes once.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx
from tvm.s_tir import dlight

from qcc.runtime.errors import QccError
from qcc.targets.spec import BuildOptions
from qcc.targets.webgpu.wasm.export import export_wasm
from qcc.targets.webgpu.wasm.tools import find_tool

SCRIPT = Path(__file__).with_name("wasm_client.mjs")
PACKAGES = SCRIPT.parents[2] / "web"
HOST = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm", "mcpu": "mvp"}
METADATA = json.dumps({"model_type": "tiny", "text": "é"})


@pytest.fixture(autouse=True)
def tools() -> None:
    for tool, package in {"emcc": "emscripten", "wasm-ld": "lld"}.items():
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} (Debian's {package})")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WebLLM's JavaScript, with one line more: what it has of TVM's web runtime is exported."""
    if shutil.which("node") is None:
        pytest.skip("no node (Debian's nodejs)")
    package = PACKAGES / "node_modules" / "@mlc-ai" / "web-llm"
    if not package.is_dir():
        pytest.skip("no npm package @mlc-ai/web-llm (npm install --prefix tests/web)")
    assert json.loads((package / "package.json").read_text())["version"] == "0.2.86"
    source = (package / "lib" / "index.js").read_text()
    used = source.index(".createPolyfillWASI()")
    name = re.search(r"[\w$]+$", source[used - 40 : used])
    assert name
    path = tmp_path_factory.mktemp("client") / "client.mjs"
    path.write_text(f"{source}\nexport {{ {name[0]} as tvmjs }};\n")
    return path


def module(*functions: Any) -> tvm.IRModule:
    """A Relax module with _metadata and what `functions` add to its builder."""
    builder = relax.BlockBuilder()
    with builder.function("_metadata", []):
        builder.emit_func_output(tvm.ir.StringImm(METADATA))
    for function in functions:
        function(builder)
    return builder.get()


def curve(builder: relax.BlockBuilder) -> None:
    """curve(x f32[n]) = exp(x) + x ** 2 + f16(x), with functions of the C library."""
    x = relax.Var("x", relax.TensorType((tirx.Var("n", "int64"),), "float32"))

    def compute(t: te.Tensor) -> te.Tensor:
        def at(i: Any) -> Any:
            square = tirx.power(t[i], tirx.FloatImm("float32", 2))
            return tirx.exp(t[i]) + square + t[i].astype("float16").astype("float32")

        return te.compute(t.shape, at, name="curve")

    with builder.function("curve", [x]):
        builder.emit_func_output(builder.emit_te(compute, x))


def strange(builder: relax.BlockBuilder) -> None:
    """A function that calls what no library has."""
    x = relax.Var("x", relax.TensorType((4,), "float32"))

    def compute(t: te.Tensor) -> te.Tensor:
        return te.compute(t.shape, lambda i: tirx.call_extern("float32", "qcc_nowhere", t[i]))

    with builder.function("strange", [x]):
        builder.emit_func_output(builder.emit_te(compute, x))


def for_gpu() -> Any:
    """An executable for WebGPU, with one kernel."""
    target = tvm.target.Target({"kind": "webgpu"}, host=HOST)
    with target:
        lowered = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module(curve))
        return relax.build(lowered, target)


@pytest.fixture(scope="module")
def gpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "webgpu.wasm"
    export_wasm(for_gpu(), path, BuildOptions())
    return path


@pytest.fixture(scope="module")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cpu") / "host.wasm"
    export_wasm(relax.build(module(curve), tvm.target.Target(HOST)), path, BuildOptions())
    return path


def run(client: Path, library: Path, action: str) -> dict[str, Any]:
    done = subprocess.run(
        ["node", SCRIPT, client, library, action], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_imports_are_what_clients_have(client: Path, gpu_library: Path) -> None:
    """Read by node, and compared with the names that stock WebLLM's source provides."""
    found = run(client, gpu_library, "names")
    assert {name.partition(".")[0] for name in found["imports"]} == {
        "env",
        "wasi_snapshot_preview1",
    }
    source = client.read_text()
    for name in found["imports"]:
        assert re.search(rf'["\s]?{name.partition(".")[2]}["\s]*[:=]', source), name


def test_exports_are_what_clients_call(client: Path, gpu_library: Path) -> None:
    """Every function of the module that stock WebLLM's source calls, and no C++ name."""
    found = run(client, gpu_library, "names")
    called = re.findall(r"\bexports\s*\.(TVM(?:FFI|Wasm)\w+)", client.read_text())
    assert len(set(called)) >= 12
    assert set(called) <= set(found["exports"])
    assert {"memory", "_initialize"} <= set(found["exports"])
    assert not [name for name in found["exports"] if name.startswith("_Z")]


def test_the_client_finds_all_that_it_looks_up(client: Path, gpu_library: Path) -> None:
    """Functions of the runtime: KV cache, tensor cache, sampling, arrays; and what models call."""
    found = run(client, gpu_library, "lookups")
    assert {
        "vm.builtin.kv_state_begin_forward",
        "vm.builtin.tensor_cache.update",
        "vm.builtin.param_module_from_cache_by_name",
        "vm.builtin.sample_top_p_from_prob",
        "tvmjs.array.decode_storage",
        "ffi.SystemLib",
    } <= set(found["wanted"])
    builtins = ("paged_attention_kv_cache_create", "kv_state_fork_sequence", "kv_state_popn")
    builtins += tuple(f"rnn_state_{name}" for name in ("create", "get", "set"))
    builtins += ("attention_kv_cache_attention_with_fused_qkv", "call_tir_dyn", "alloc_storage")
    wanted = {*found["wanted"], *(f"vm.builtin.{name}" for name in builtins)}
    assert wanted <= set(found["registered"])


def test_metadata_of_a_gpu_library_is_read(client: Path, gpu_library: Path) -> None:
    """By the VM in the wasm, where no GPU is."""
    assert run(client, gpu_library, "metadata") == {"metadata": METADATA}


def test_numbers_and_errors(client: Path, cpu_library: Path) -> None:
    """The VM computes; whatever fails is a message, and the module goes on computing."""
    found = run(client, cpu_library, "numbers")
    x = np.array([0, 1, -2, 0.25, 30], "float32").astype("float64")
    expected = np.exp(x) + x**2 + x  # each x is a half
    np.testing.assert_allclose(found["before"], expected, rtol=1e-6)
    assert found["after"] == found["before"]
    errors = found["errors"]
    assert "curve expects 1 arguments (x), but 2 arguments were provided" in errors["count"]
    assert "expect a Tensor but get" in errors["type"]
    assert errors["callback"] == "Error: the device is lost"


def test_a_symbol_that_nobody_has_is_named(tmp_path: Path) -> None:
    """And there is no library."""
    executable = relax.build(module(strange), tvm.target.Target(HOST))
    path = tmp_path / "webgpu.wasm"
    with pytest.raises(QccError, match=r"webgpu\.wasm: .* imports env\.qcc_nowhere, which no"):
        export_wasm(executable, path, BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_no_path_of_this_machine_is_in_the_library(gpu_library: Path) -> None:
    """The same wheels give the same bytes wherever they are installed."""
    folder = Path(tvm.__file__).parents[1]
    wasm = gpu_library.read_bytes()
    assert str(folder).encode() not in wasm and b"/tmp/" not in wasm
    assert b"tvm/src/runtime/vm/vm.cc" in wasm


@pytest.mark.slow
def test_o3_is_small(client: Path, tmp_path: Path) -> None:
    """Under 4 MB, and it still runs."""
    if find_tool("wasm-opt") is None:
        pytest.skip("no wasm-opt (Debian's binaryen)")
    path = tmp_path / "webgpu.wasm"
    export_wasm(for_gpu(), path, BuildOptions(opt=3))
    assert path.stat().st_size < 4_000_000
    assert run(client, path, "metadata") == {"metadata": METADATA}
    found = run(client, path, "lookups")
    assert set(found["wanted"]) <= set(found["registered"])
