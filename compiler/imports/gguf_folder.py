"""A .gguf file -> a checkpoint folder in the cache: configs from its metadata, links to its parts.

The folder is made anew when the file changes; making it reads no weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from qcc.compiler.imports.gguf_config import config_of, generation_config
from qcc.compiler.imports.gguf_file import FLOATS, find_naming
from qcc.compiler.imports.gguf_header import Header, read_header
from qcc.compiler.imports.gguf_tokenizer import tokenizer_of
from qcc.compiler.weights.checkpoint import GGUF
from qcc.quant_schemes.packing import Array
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, os_errors, temporary_name, write_file

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def find_gguf(folder: Path) -> Path | None:
    """The only .gguf file, or the first part of the only one, in a folder without a config.json.

    Raises:
        QccError: there are several.
    """
    if (folder / "config.json").exists():
        return None
    found = sorted(folder.glob("*.gguf"))
    matches = [_PART.fullmatch(path.name) for path in found]
    first = [p for p, match in zip(found, matches, strict=True) if not match or int(match[2]) == 1]
    if len(first) > 1:
        names = ", ".join(path.name for path in first)
        raise QccError(f"{folder} holds several .gguf files ({names}); give one of them")
    return first[0] if first else None


def gguf_folder(path: Path) -> Path:
    """The checkpoint folder of a .gguf file, made where it is not there yet.

    Raises:
        QccError: the file is not GGUF, corrupt, or of a model that is not supported.
    """
    parts = _parts(path.resolve())
    with os_errors(path, "read"):
        stats = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    folder = cache_dir() / "gguf" / f"{parts[0].stem}-{key}"
    done = folder / "config.json"
    links = [GGUF, *(f"model-{i:05}.gguf" for i in range(2, len(parts) + 1))]
    if done.is_file() and all((folder / link).exists() for link in links):
        return folder
    header = read_header(parts[0])
    find_naming(header, path)
    config = config_of(header, path, _rope_factors(header, parts[0]))
    tokenizer, tokenizer_config = tokenizer_of(header.metadata, path, config["vocab_size"])
    generation = generation_config(header)
    config |= generation
    with os_errors(folder, "make"):
        folder.mkdir(parents=True, exist_ok=True)
        for link, part in zip(links, parts, strict=True):
            temporary = temporary_name(folder / link)
            temporary.symlink_to(part)
            os.replace(temporary, folder / link)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
        (done.name, config),  # the last: with it the folder is whole
    ):
        write_file(folder / name, _text(content))
    return folder


def _text(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _parts(path: Path) -> list[Path]:
    """All parts of the file of which `path` is one, in order."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    if not 0 < int(count) <= 1000:
        raise QccError(f"{path}: {count} parts")
    parts = [path.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise QccError(f"{path}: its part {missing[0]} is missing; put all parts into one folder")
    return parts


def _rope_factors(header: Header, path: Path) -> Array | None:
    """rope_freqs.weight f32[rotary_dim / 2], where there is one.

    Raises:
        QccError: another table of factors, or it cannot be read.
    """
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in header.tensors:
            raise QccError(f"{path}: {name}: longrope scaling is not supported")
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.kind != "F32" or math.prod(info.shape) > 1 << 16:
        raise QccError(f"{path}: rope_freqs.weight is {info.kind} {list(info.shape)}")
    with os_errors(path, "read"), path.open("rb") as file:
        file.seek(info.begin)
        data = file.read(info.nbytes)
    return np.frombuffer(data, FLOATS["F32"])
