"""qcc package web: a static site of an artifact, for our page and for stock WebLLM alike.

  index.html page.js page.css     the page         README.md          how to serve and use it
  qcc.js qcc.d.ts                 its library      licences/          of all that is in here
  model-record.json               what qcc.js and WebLLM load
  models/NAME/resolve/main/       wasm, weights, configuration, tokenizer

The folder is made under a temporary name and renamed: it is there whole or as it was. Weights are
linked where the disk allows that, else copied.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcc.runtime.artifact import (
    CHAT_CONFIG,
    TENSOR_CACHE,
    Artifact,
    stored_metadata,
    tensor_bytes,
)
from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors, remove_stale, temporary_name
from qcc.targets.spec import PackageOptions
from qcc.targets.webgpu.bundle import FILES, bundle
from qcc.targets.webgpu.licences import licences

RECORD = "model-record.json"
TARGET = "webgpu"
_OURS = "qcc-site.json"  # tells a site of ours from other people's folders
_NOT_SERVED = ("qcc.json", "lib")
_MIB = 2**20


def package_site(options: PackageOptions) -> dict[str, Any]:
    """Write the site; returns its path, the model's name, bytes and what a browser needs.

    Raises:
        QccError: no library for webgpu, somebody else's folder, no node, a full disk.
    """
    artifact = Artifact.open(options.artifact)
    library = artifact.libraries(TARGET).get(TARGET)
    if library is None:
        raise QccError(
            f"{options.artifact}: no library for browsers; add one with "
            f"qcc compile MODEL --target {TARGET} -o {options.artifact}"
        )
    artifact.verify()
    name = _checked_name(options.name or _default_name(artifact))
    record = model_record(artifact, library, name)
    scripts = bundle(options.tell)
    with _replacing(options.out, options.artifact, options.force) as site:
        for file in FILES:
            shutil.copyfile(scripts / file, site / file)
        _write_model(artifact, library, site / record["model"] / "resolve" / "main")
        for file, path in licences(artifact.folder).items():
            _place(path, site / "licences" / file, link=False)
        _write_json(site / RECORD, record)
        (site / "README.md").write_text(_readme(record), encoding="utf-8")
        _write_json(site / _OURS, {"model_id": name})
        nbytes = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    return {
        "path": str(options.out),
        "model_id": name,
        "bytes": nbytes,
        "required_features": record["required_features"],
        "vram_required_MB": record["vram_required_MB"],
    }


def model_record(artifact: Artifact, library: Path, name: str) -> dict[str, Any]:
    """The ModelRecord of CONTRACTS section 5; its URLs are relative to where it lies.

    `vram_required_MB`: weights, KV cache and temporaries at the library's full context.
    """
    folder = f"models/{name}"
    requires = artifact.manifest.libraries[TARGET].requires
    weights = sum(record.nbytes for record in artifact.records.values())
    return {
        "model": folder,
        "model_id": name,
        "model_lib": f"{folder}/resolve/main/{library.name}",
        "required_features": sorted(requires.get("features", ())),
        "vram_required_MB": round(_gpu_bytes(json.loads(stored_metadata(library))) / _MIB, 1),
        "qcc": {"files": [path.name for path in _texts(artifact)], "weight_bytes": weights},
    }


def _gpu_bytes(meta: Mapping[str, Any]) -> int:
    """Weights, a KV cache of one sequence, and the largest function's temporaries."""
    own, kv = meta["qcc"], meta["kv_cache"]
    weights = sum(tensor_bytes(param["shape"], param["dtype"]) for param in meta["params"])
    storage = next(iter(own["kv_storages"].values()), {"token_values": 0})
    tokens = max(meta["context_window_size"], meta["sliding_window_size"]) + own["page_size"]
    layers = kv["num_hidden_layers"] if storage["token_values"] else 0
    per_token = layers * tensor_bytes([storage["token_values"]], own["compute_dtype"])
    used = [meta["memory_usage"].get(name, 0) for name in ("embed", "prefill", "decode", "encode")]
    return int(weights + tokens * per_token + max(used))


def _default_name(artifact: Artifact) -> str:
    return f"{artifact.manifest.source.get('name', 'model')}-{artifact.manifest.scheme}"


def _checked_name(name: str) -> str:
    """A name that is one part of a URL."""
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")
    if not plain:
        raise QccError(f"--name {name!r}: letters, digits, '-', '_' and '.' make a name")
    return plain


def _texts(artifact: Artifact) -> list[Path]:
    """The artifact's configuration, tokenizer and legal files."""
    files = (path for path in artifact.folder.iterdir() if path.is_file())
    shards = {shard.file for shard in artifact.shards}
    return sorted(
        path
        for path in files
        if path.name not in (*_NOT_SERVED, *shards) and not path.name.startswith(".")
    )


def _write_model(artifact: Artifact, library: Path, folder: Path) -> None:
    for path in _texts(artifact):
        _place(path, folder / path.name, link=False)
    for shard in artifact.shards:
        _place(artifact.folder / shard.file, folder / shard.file, link=True)
    _place(library, folder / library.name, link=True)
    assert (folder / CHAT_CONFIG).is_file() and (folder / TENSOR_CACHE).is_file()


def _place(source: Path, target: Path, link: bool) -> None:
    """Copy a file, or give it a second name where both lie on one disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # another disk, or a file system without links
    shutil.copyfile(source, target)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(out: Path, artifact: Path, force: bool) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends.

    Raises:
        QccError: `out` holds what is not ours to replace, or cannot be written.
    """
    whole = out.resolve()
    if out.exists() and not out.is_dir():
        raise QccError(f"-o {out}: that is a file; give a folder")
    with os_errors(out, "write"):
        kept = [Path.cwd(), Path.home(), artifact.resolve()]
        if any(path == whole or whole in path.parents for path in kept):
            raise QccError(f"-o {out}: that folder holds more than the site; give a new one")
        ours = not whole.exists() or (whole / _OURS).exists() or not any(whole.iterdir())
        if not (ours or force):
            raise QccError(
                f"-o {out}: that folder has files and is no site of qcc; give a new or an empty "
                "folder, or --force to replace it"
            )
        whole.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(whole.parent, glob.escape(whole.name))
        work = temporary_name(whole)
        work.mkdir()
        try:
            yield work
            old = temporary_name(whole)
            if whole.exists():
                whole.rename(old)
            work.rename(whole)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _readme(record: Mapping[str, Any]) -> str:
    needs = ", ".join(record["required_features"]) or "nothing beyond WebGPU"
    return f"""# {record["model_id"]}, in the browser

A static site: put the folder on any web server that speaks https (or open it through
`qcc package web ... --serve` on this machine). The model runs on the visitor's GPU; nothing that is
typed leaves the browser. It needs a browser with WebGPU, {record["vram_required_MB"]} MB of GPU
memory, and of the GPU: {needs}.

The server should send `.wasm` as `application/wasm`, and, for pages of other origins, the header
`Access-Control-Allow-Origin: *`.

## In a page of your own

```js
import {{ load }} from "./qcc.js"; // its types are in qcc.d.ts

const model = await load("./");
const answer = model.generate("Once upon a time", {{ temperature: 0.8, seed: 1 }});
for await (const piece of answer) document.body.append(piece);
console.log(answer.result);
```

## In WebLLM

`{RECORD}` is a ModelRecord. Make its URLs absolute and hand it over:

```js
const record = await (await fetch("{RECORD}")).json();
for (const key of ["model", "model_lib"]) record[key] = new URL(record[key], location.href).href;
const appConfig = {{ model_list: [record] }};
const engine = await webllm.CreateMLCEngine(record.model_id, {{ appConfig }});
```

The licences of all that is in this folder are in `licences/`, those of the model in
`licences/model/` as far as its checkpoint has them.
"""
