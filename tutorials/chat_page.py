"""Tutorial 5: a chat page from a checkpoint.

    python -m qcc.tutorials.chat_page                   # the bundled model, a minute the first time
    python -m qcc.tutorials.chat_page CHECKPOINT --quant q4f16_1 -o SITE --serve

Compiling for browsers needs Debian's packages emscripten and lld, packaging node and npm (`qcc
doctor` says which are there); the browser that opens the page needs WebGPU and nothing of qcc.
Each step names the command line that does the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from qcc.compiler import CompileOptions, compile_model
from qcc.compiler.cli._site_server import open_server
from qcc.compiler.steps import Steps
from qcc.runtime.artifact import Artifact
from qcc.targets import find_target
from qcc.targets.spec import PackageOptions
from qcc.tutorials.tiny import MODEL_DIR

PORT = 8000


def main() -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=str(MODEL_DIR))
    parser.add_argument("--quant", default="q4f32_1", help="scheme (default: %(default)s)")
    parser.add_argument("-o", "--out", default=None, help="the site (default: a temporary folder)")
    parser.add_argument("--serve", action="store_true", help="serve the site until Ctrl-C")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(args.out or Path(folder) / "site")
        tutorial(args.checkpoint, Path(folder) / "artifact", site, args.quant)
        if args.serve:
            # 4. qcc package web ARTIFACT -o SITE --serve
            # Any web server will do that sends .wasm as application/wasm; browsers give WebGPU to
            # https and to localhost only.
            server = open_server(site, PORT, PORT)
            print(f"\n4. Open {server.url} in a browser with WebGPU (end with Ctrl-C)")
            server.serve()


def tutorial(checkpoint: str, artifact: Path, site: Path, quant: str) -> dict[str, object]:
    """Compile into `artifact`, package into `site`; returns the record that browsers load."""
    # 1. qcc compile CHECKPOINT --quant q4f32_1 --target webgpu -o ARTIFACT
    # Schemes with f16 in their name compute in half floats, which not every GPU has in browsers;
    # those with f32 run wherever there is WebGPU. Kernels beyond its portable limits would stop
    # this step, not the page.
    print("1. Compile")
    compile_model(checkpoint, artifact, CompileOptions(quant=quant, targets=("webgpu",)), Steps())
    (library,) = Artifact.open(artifact).libraries("webgpu").values()
    print(f"   {library.name}: {library.stat().st_size / 1e6:.1f} MB of wasm and shaders")

    # 2. qcc package web ARTIFACT -o SITE
    # A folder of plain files: the page, its library qcc.js for pages of your own, the model, the
    # licences. The first time npm brings what the page is made of.
    print("\n2. Package")
    make = find_target("webgpu").packages["web"]
    facts = make(PackageOptions(artifact, site))
    print(f"   {facts['model_id']}: {facts['bytes'] / 1e6:.1f} MB")
    print(f"   needs of a GPU: {', '.join(facts['required_features']) or 'WebGPU'}")

    # 3. The same folder serves stock WebLLM: model-record.json is what its model list wants.
    #     import { CreateMLCEngine } from "@mlc-ai/web-llm";
    #     CreateMLCEngine(record.model_id, { appConfig: { model_list: [record] } })
    print("\n3. What other clients load")
    record: dict[str, object] = json.loads((site / "model-record.json").read_text("utf-8"))
    for key, value in record.items():
        print(f"   {key:<20}{value}")
    return record


if __name__ == "__main__":
    main()
