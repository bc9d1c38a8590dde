"""What `qcc eval` does of embedding models: how far their vectors are from the original's.

Not a verb. A text is a line of the file, cut to the window; transformers runs the original in fp32,
each text alone.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.cli._running import text_lines
from qcc.compiler.reference import Original, import_transformers
from qcc.compiler.source import locate
from qcc.runtime.engine.embedder import Embedder, similarities, unit
from qcc.runtime.errors import QccError
from qcc.runtime.eval.protocol import read_text
from qcc.runtime.manifest import read_manifest

if TYPE_CHECKING:
    from qcc.compiler.cli._evaluation import EvalOptions
    from qcc.compiler.steps import Steps

Floats = npt.NDArray[np.float32]
MAX_TEXTS = 256  # the first ones; the original takes its time
# Of `qcc eval`, as argparse names them; they say nothing of embedding models.
OTHERS = (
    *("html", "store", "save_logits", "tensors", "layers", "activations", "context", "lora", "kv"),
)


@dataclass(frozen=True)
class Agreement:
    """Cosines between an artifact's vectors and the original's, on average and the least.

    `pairs` is the mean |difference| of the cosines of any two texts: what a search would notice.
    """

    artifact: str
    scheme: str
    texts: int
    tokens: int
    cosine: float
    least: float
    pairs: float

    def __str__(self) -> str:
        return (
            f"{self.artifact}  {self.scheme}: cosine with the original {self.cosine:.6f} on "
            f"average, {self.least:.6f} at least; cosines of pairs off by {self.pairs:.6f} "
            f"({self.texts} texts, {self.tokens:,} tokens)"
        )


def are_embeddings(folders: Sequence[Path | str]) -> bool:
    """Whether artifacts are of embedding models.

    Raises:
        QccError: some are and some are not.
    """
    tasks = {str(folder): read_manifest(Path(folder)).get("task", "chat") for folder in folders}
    if len(set(tasks.values())) > 1:
        found = next(folder for folder, task in tasks.items() if task == "embedding")
        raise QccError(f"{found} is an embedding model, others write text: they do not compare")
    return "embedding" in tasks.values()


def check_flags(args: argparse.Namespace) -> None:
    """Refuse the flags of `qcc eval` that are not for embedding models."""
    for name in OTHERS:
        if getattr(args, name):
            raise QccError(f"--{name.replace('_', '-')}: not for embedding models")


def agreement(
    folders: Sequence[Path | str], text: Path | str, options: EvalOptions, steps: Steps
) -> list[Agreement]:
    """Compare artifacts with the checkpoint that they were made of.

    Raises:
        QccError: no checkpoint, no text, or a checkpoint that transformers does not run.
    """
    if options.against is None:
        raise QccError("an embedding model is measured against its original: --against MODEL")
    if options.reference == "qcc":
        raise QccError("--reference qcc: not for embedding models; transformers is")
    lines = text_lines(read_text(text).content)[:MAX_TEXTS]
    if not lines:
        raise QccError(f"{text}: no text in it; each line is one")
    original = Original(locate(options.against, options.allow_pickle), options.allow_pickle)
    found = []
    expected: dict[str, Floats] = {}  # by what the vectors depend on besides the checkpoint
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of cut texts
            embedder = Embedder(folder, threads=options.threads, precision=options.precision)
            tokens = _bounded(embedder.tokenize(lines), options.max_tokens)
        if not original.is_source(embedder.artifact.manifest.source):
            raise QccError(f"{folder} was not compiled from {options.against}")
        usage = embedder.artifact.chat_config["embedding"]
        key = json.dumps([usage["pooling"], tokens])
        if key not in expected:
            with steps.step("Run the original"):
                expected[key] = original_vectors(original, tokens, usage["pooling"])
        with steps.step(f"Run {Path(folder).name}"):
            vectors = embedder.encode(tokens)
        found.append(_compare(folder, embedder, tokens, vectors, expected[key]))
    return found


def _bounded(tokens: list[list[int]], limit: int | None) -> list[list[int]]:
    """The first texts, up to `limit` tokens; one at least."""
    if limit is None:
        return tokens
    total = np.cumsum([len(ids) for ids in tokens])
    return tokens[: max(1, int((total <= limit).sum()))]


def original_vectors(original: Original, tokens: Sequence[Sequence[int]], pooling: str) -> Floats:
    """f32[b, h] of token ids, by transformers and one of `cls`, `mean`, `last`.

    Raises:
        QccError: transformers is not there, or does not load the checkpoint.
    """
    torch, transformers = import_transformers()
    if not original.is_plain:
        raise QccError(
            f"{original.folder}: transformers does not read these weights, so there is nothing to "
            "compare with"
        )
    try:
        model = transformers.AutoModel.from_pretrained(
            original.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as err:
        first = next((line for line in str(err).splitlines() if line.strip()), "")
        raise QccError(f"{original.folder}: transformers does not load it: {first}") from err
    found = []
    for ids in tokens:
        with torch.no_grad():
            states = model(torch.tensor([list(ids)])).last_hidden_state[0]  # [n, h]
        pools = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}
        found.append(pools[pooling].numpy())
    return np.stack(found)


def _compare(
    folder: Path | str, embedder: Embedder, tokens: list[list[int]], ours: Floats, theirs: Floats
) -> Agreement:
    cosines = (unit(ours).astype(np.float64) * unit(theirs)).sum(axis=1)
    return Agreement(
        str(folder),
        embedder.artifact.manifest.scheme,
        len(tokens),
        sum(len(ids) for ids in tokens),
        float(cosines.mean()),
        float(cosines.min()),
        float(np.abs(similarities(ours) - similarities(theirs)).mean()),
    )


def show(found: Sequence[Agreement], as_json: bool) -> None:
    """Print a line of each artifact, or one object."""
    if as_json:
        rows: list[dict[str, Any]] = [asdict(each) for each in found]
        print(json.dumps({"task": "embedding", "artifacts": rows}))
    else:
        print("\n".join(map(str, found)))
