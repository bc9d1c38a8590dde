"""MODEL on the command line -> a local checkpoint folder, and the checksum of what is in it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from qcc.compiler.imports.gguf_folder import find_gguf, gguf_folder
from qcc.compiler.imports.lora import CONFIG, WEIGHTS
from qcc.runtime.errors import QccError

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
# What says how an embedding model's library makes a vector (qcc.compiler.embedding reads it).
EMBEDDING_MODULES = "modules.json"
EMBEDDING_FILES = (
    EMBEDDING_MODULES,
    "*/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "*.txt"]
_CHUNK = 1 << 22


def locate(model: str, allow_pickle: bool = False) -> Path:
    """A local folder as it is; a hub id through huggingface_hub, if installed and online.

    A .gguf file, or a folder with nothing else, becomes a folder in the cache that links to it.

    Raises:
        QccError: neither a folder nor a model that can be downloaded; a corrupt .gguf file.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        gguf = find_gguf(path)
        return path if gguf is None else gguf_folder(gguf)
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf_folder(path)
        raise QccError(
            f"{model} is a file; give the checkpoint's folder (with its config.json), or a .gguf"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise QccError(f"{model}: no such folder, and not a hub id of the form organization/name")
    return _download(model, allow_pickle)


def _download(model: str, allow_pickle: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as err:
        raise QccError(
            f"{model}: no such folder; to download it from the hub: pip install 'qcc[hub]'"
        ) from err
    patterns = WANTED + (["pytorch_model*.bin"] if allow_pickle else [])
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as err:
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise QccError(
            f"{model}: no such folder, and it could not be downloaded from the hub ({first}); "
            "download the checkpoint elsewhere and give its folder"
        ) from err


def source_files(folder: Path, lora: Path | None = None) -> list[Path]:
    """config.json and every weight file of a checkpoint, and of an adapter to it.

    Of an embedding model also what says how vectors are made, as its pooling.
    """
    found = [folder / "config.json"]
    is_embedding = (folder / EMBEDDING_MODULES).is_file()
    for pattern in (*WEIGHT_FILES, *(EMBEDDING_FILES if is_embedding else ())):
        found += sorted(folder.glob(pattern))
    return found if lora is None else [*found, lora / CONFIG, lora / WEIGHTS]


def stamp(folder: Path, lora: Path | None = None) -> list[list[str | int]]:
    """[name, bytes, time of change in ns] of every source file: the same, the same checksum."""
    found: list[list[str | int]] = []
    for path in source_files(folder, lora):
        try:
            stat = path.stat()
        except OSError as err:
            raise QccError(f"{path}: {err.strerror}") from err
        found.append([path.name, stat.st_size, stat.st_mtime_ns])
    return found


def checksum(folder: Path, lora: Path | None = None) -> str:
    """sha256 over all source files, an adapter's too, names and contents."""
    digest = hashlib.sha256()
    for path in source_files(folder, lora):
        digest.update(path.name.encode())
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as err:
            raise QccError(f"{path}: {err.strerror}") from err
    return digest.hexdigest()
