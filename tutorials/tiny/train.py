"""Trains the tiny model: text, tokenizer, packed rows, AdamW, Hugging Face folder, figures.

    python train.py                 rebuild model/ and heldout.txt
    python train.py --evaluate      print the figures of the model that is there

Same seed, same text and tokenizer. The weights agree to rounding only: CPU sums are not ordered.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from qcc.tutorials.tiny import HELDOUT, MODEL_DIR
from qcc.tutorials.tiny.figures import measure, samples
from qcc.tutorials.tiny.make_text import (
    CHATS,
    HELDOUT_SEED,
    STORIES,
    TRAIN_SEED,
    chats,
    stories,
    write,
)
from qcc.tutorials.tiny.tokenizer import MAX_TOKENS, VOCAB, tokenizer_files, train_tokenizer

Rows = npt.NDArray[np.int16]
BOS_ID, EOS_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(6)
HELDOUT_STORIES = 55
CONFIG_KEYS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "transformers_version", "use_cache",
    "vocab_size",
)  # fmt: skip


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document: BOS text EOS; -1 where nothing is to be learnt.

    The model does not learn to write BOS, or what the user and the system say.
    """
    documents = []
    for encoding in tokenizer.encode_batch(texts):
        ids = [*encoding.ids, EOS_ID]
        labels, learn = ids.copy(), True
        labels[0] = -1
        for i, token in enumerate(ids):
            if token in (USER_ID, SYSTEM_ID):
                learn = False
            if not learn or token == ASSISTANT_ID:
                labels[i] = -1
            if token in (ASSISTANT_ID, END_ID):
                learn = True
        documents.append((ids, labels))
    return documents


def pack(documents: list[tuple[list[int], list[int]]], seed: int) -> tuple[Rows, Rows]:
    """Whole documents side by side in rows of ``MAX_TOKENS``: ids, labels, each int16[rows, 512].

    A document goes into the fullest of 64 open rows that has room; a document is never cut, so
    every row starts with BOS and little is padding.
    """
    rng = np.random.default_rng(seed)
    done: list[tuple[list[int], list[int]]] = []
    rows: list[tuple[list[int], list[int]]] = []
    for k in rng.permutation(len(documents)):
        ids, labels = documents[k]
        if len(ids) > MAX_TOKENS:
            continue
        fits = [r for r in rows if len(r[0]) + len(ids) <= MAX_TOKENS]
        if fits:
            row = max(fits, key=lambda r: len(r[0]))
            row[0].extend(ids)
            row[1].extend(labels)
            continue
        rows.append((ids.copy(), labels.copy()))
        if len(rows) > 64:
            fullest = max(range(len(rows)), key=lambda i: len(rows[i][0]))
            done.append(rows.pop(fullest))
    done += rows
    x = np.full((len(done), MAX_TOKENS), EOS_ID, np.int16)
    y = np.full((len(done), MAX_TOKENS), -1, np.int16)
    for i, (ids, labels) in enumerate(done):
        x[i, : len(ids)], y[i, : len(labels)] = ids, labels
    order = rng.permutation(len(done))
    return x[order], y[order]


def make_config() -> LlamaConfig:
    """3.2 million parameters; sizes are multiples of 256, so every block format fits."""
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=MAX_TOKENS, rope_theta=10000.0, rms_norm_eps=1e-5,
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID, use_cache=True,
    )  # fmt: skip


def positions(x: Rows) -> Rows:
    """Each token's place in its own document: int16[rows, 512], 0 at every BOS.

    From the places that start again transformers sees the documents and lets none look at another.
    """
    place = np.arange(x.shape[1])
    start = np.maximum.accumulate(np.where(x == BOS_ID, place, 0), axis=1)
    return (place - start).astype(np.int16)


def fit(x: Rows, y: Rows, tokenizer: Tokenizer, args: argparse.Namespace) -> LlamaForCausalLM:
    """Train until the steps are done or, if a limit is set, the minutes; save on the way.

    The cosine follows whichever is further on, so a run on a busy machine still ends at a low rate.
    """
    torch.manual_seed(args.seed)
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
        x, y = x[::-1], y[::-1]  # what the first run has seen least of
    else:
        model = LlamaForCausalLM(make_config())
    model.train()
    forward = torch.compile(model) if args.compile else model
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    start, mean = time.perf_counter(), 0.0
    for step in range(args.steps):
        share = step / args.steps
        if args.minutes:
            share = max(share, (time.perf_counter() - start) / 60 / args.minutes)
        if share >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = np.arange(step * args.batch, (step + 1) * args.batch) % len(x)
        ids = torch.from_numpy(x[at].astype(np.int64))  # [b, t]
        target = torch.from_numpy(y[at].astype(np.int64))[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            place = torch.from_numpy(positions(x[at]).astype(np.int64))
            logits = forward(input_ids=ids, position_ids=place, use_cache=False).logits  # [b, t, v]
        loss = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), target.flatten(), ignore_index=-1
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            spent = time.perf_counter() - start
            print(
                f"step {step + 1}/{args.steps}  loss {mean:.4f}  lr {rate:.1e}  "
                f"{(step + 1) * ids.numel() / spent:.0f} tok/s  "
                f"{spent / 60 * (1 - share) / max(share, 1e-3):.1f} min left",
                flush=True,
            )
        if (step + 1) % args.save_every == 0:
            save(model, tokenizer, args.out)
    return model


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder; each file appears whole or not at all, so nobody reads half of one."""
    whole = model.config.to_dict()
    config = {key: whole[key] for key in CONFIG_KEYS}
    # transformers 5 writes rope_parameters and dtype; readers of the older style want these too
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rope_scaling": None,
               "rope_theta": 10000.0, "torch_dtype": "bfloat16"}  # fmt: skip
    generation = {
        "bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, END_ID], "pad_token_id": EOS_ID,
    }  # fmt: skip
    files = tokenizer_files(tokenizer)
    files["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        part = out / f".{name}.part"
        part.write_text(content, encoding="utf-8")
        os.replace(part, out / name)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied: the embedding, once
    }
    part = out / ".model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)  # save_file makes it private
    os.replace(part, out / "model.safetensors")


def print_figures(out: Path, heldout: Path, train_stories: list[str]) -> None:
    """Sample outputs, then the figures; the last line is one JSON object."""
    for prompt, answer in samples(out):
        print(f"--- {prompt}\n{answer}")
    figures = measure(out, heldout, train_stories)
    size = sum(f.stat().st_size for f in out.iterdir())
    print(json.dumps({
        "heldout_tokens": figures.tokens, "perplexity": round(figures.model, 4),
        "unigram_perplexity": round(figures.unigram, 2), "ratio": round(figures.ratio, 1),
        "model_bytes": size,
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--evaluate", action="store_true", help="do not train, print figures")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="held-out stories")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="seed of text and weights")
    parser.add_argument("--stories", type=int, default=STORIES, help="stories to learn from")
    parser.add_argument("--chats", type=int, default=CHATS, help="conversations to learn from")
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saves")
    parser.add_argument("--resume", type=Path, help="folder of a model to go on from")
    parser.add_argument("--minutes", type=float, default=0, help="stop then; 0 for no limit")
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"writing {args.stories} stories and {args.chats} conversations, seed {args.seed}")
    told = list(stories(args.seed, args.stories))
    if args.evaluate:
        print_figures(args.out, args.heldout, told)
        return
    known = set(told)
    write(args.heldout, (s for s in stories(HELDOUT_SEED, HELDOUT_STORIES) if s not in known))
    talked = list(chats(args.seed, args.chats))
    tokenizer = train_tokenizer(told[:10_000] + talked[:10_000])
    x, y = pack(encode(tokenizer, told + talked), args.seed)
    print(f"{len(x)} rows of {MAX_TOKENS}, {np.mean(y >= 0):.1%} of the tokens are learnt")
    model = fit(x, y, tokenizer, args)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    save(model, tokenizer, args.out)
    print_figures(args.out, args.heldout, told)


if __name__ == "__main__":
    main()
