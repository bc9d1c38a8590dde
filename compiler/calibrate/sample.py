"""sample: documents that a model writes itself, many at once, at temperature 1.

The whole model lies in memory here: a token at a time, reading its layers again from the disk
would take a minute a token. In bfloat16 where the checkpoint has no wider numbers and the CPU
multiplies them fast, or where f32 does not fit; else in f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from qcc.compiler.calibrate.layers import LayerwiseModel
from qcc.compiler.calibrate.libraries import suited_threads, torch, transformers
from qcc.compiler.calibrate.text import Tokens
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError

MAX_BATCH = 64
MEMORY_SHARE = 0.6  # of what is free: the rest is for keys, values and logits
KV_BYTES = 2 << 30
Progress = Callable[[int, int], None]  # tokens done, tokens asked for


def sample(
    folder: Path,
    special: Tokens,
    tokens: int,
    context: int,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Documents of `tokens` tokens in all or somewhat more, without BOS and EOS.

    Args:
        folder: of config.json.
        special: its tokens; `first` begins a document.
        tokens: as many are wanted.
        context: a document ends at EOS or after context - 1 tokens.
        seed: the same machine and seed give the same text.
        checkpoint: open; None: the one in `folder`.
        device: of torch; None: CUDA where there is one.
        progress: called after each step.

    Raises:
        QccError: the model does not fit in memory, or its logits are no numbers.
    """
    layerwise = LayerwiseModel(folder, checkpoint, device)
    model = layerwise.whole(_dtype(layerwise, folder))
    count = min(MAX_BATCH, _fitting(model, context), -(-tokens // context))
    generator = torch.Generator(layerwise.device).manual_seed(seed)
    documents: list[list[int]] = []
    done = 0
    with suited_threads(layerwise.width):
        while done < tokens:
            rows = torch.full((count, 1), special.first, device=layerwise.device)

            def report(written: int, before: int = done) -> None:
                if progress:
                    progress(min(before + written, tokens), tokens)

            found = _write(model, rows, special, context, generator, report)
            documents += found
            done += sum(len(document) + 1 for document in found)
    return documents


def _write(
    model: Any,
    rows: Any,
    special: Tokens,
    context: int,
    generator: Any,
    report: Callable[[int], None],
) -> list[list[int]]:
    """A document for each row int64[b, 1], in the order of the rows."""
    cache = transformers.DynamicCache(config=model.config)
    documents: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    ends = torch.tensor(special.eos, device=rows.device)
    while alive:
        out = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # The ids past the tokenizer's are no tokens.
        logits = out.logits[:, -1, : special.size].float()
        if not torch.isfinite(logits).all():
            raise QccError(
                "to sample text: the model's logits are NaN or infinite; the checkpoint is "
                "damaged, or transformers runs it wrongly"
            )
        rows = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        goes_on = ~torch.isin(rows[:, 0], ends)
        for row, token in zip(alive, rows[:, 0].tolist(), strict=True):
            documents[row].append(token)
        alive = [row for row, more in zip(alive, goes_on.tolist(), strict=True) if more]
        if len(alive) < len(goes_on):
            # batch_select_indices does the same, but knows no layers that keep states.
            cache.reorder_cache(goes_on.nonzero()[:, 0])
            rows = rows[goes_on]
        if alive and len(documents[alive[0]]) >= context - 1:
            alive = []
        report(sum(map(len, documents)))
    eos = set(special.eos)
    return [document[:-1] if document[-1] in eos else document for document in documents]


def _dtype(layerwise: LayerwiseModel, folder: Path) -> Any:
    """f32 or bfloat16: what the model fits in, and what its numbers and the CPU are made for."""
    shape, dtype_of = layerwise.checkpoint.shape, layerwise.checkpoint.dtype
    sources = set(layerwise.sources.values())
    numbers = sum(math.prod(shape(source)) for source in sources)
    free = psutil.virtual_memory().available
    fast = {}
    if layerwise.device.type == "cuda":
        free, fast = torch.cuda.mem_get_info(layerwise.device)[0], {"amx_bf16": True}
    elif hasattr(torch.cpu, "get_capabilities"):
        fast = torch.cpu.get_capabilities()
    choices = [(torch.float32, 4), (torch.bfloat16, 2)]
    wide = any(dtype_of(source) == "float32" for source in sources)
    if not wide and (fast.get("amx_bf16") or fast.get("avx512_bf16")):
        choices.reverse()
    for dtype, size in choices:
        if size * numbers <= MEMORY_SHARE * free:
            return dtype
    raise QccError(
        f"{folder}: to sample text the model needs {2 * numbers / 1e9:.1f} GB of memory, "
        f"{MEMORY_SHARE * free / 1e9:.1f} GB are there for it; give a text: --calib FILE"
    )


def _fitting(model: Any, context: int) -> int:
    """Documents whose keys and values fit in KV_BYTES."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * context
    return int(max(1, KV_BYTES // each))
