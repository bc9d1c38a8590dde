"""llama.cpp through llama-cpp-python: a GGUF file made of the checkpoint, token ids in.

Kinds: bf16, and llama.cpp's names of quantized types (Q4_0, Q8_0, Q4_K_M, Q2_K), each the mixture
that it makes by itself: in Q4_0 the head has 6.6 bits. With -pure (Q4_0-pure: 4.5 bits) all
matrices have the one type. The file has no vocabulary, since only ids are passed, and no factors of
a scaled rotation, which cost nothing. Flash attention and the types of the KV cache (f16) are
llama.cpp's defaults.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

CONTEXT, CHUNK = 2048, 512  # tokens
PURE = "-pure"
# Hugging Face's names of a layer's tensors -> GGUF's.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Peer:
    """A model and one context; see peer_serve."""

    def __init__(self, checkpoint: str, kind: str, folder: str, threads: int) -> None:
        """Make the file if it is not there, and load it."""
        path = gguf_file(Path(checkpoint), kind, Path(folder))
        llama_cpp.llama_backend_init()
        self._keep = _silent()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, CHUNK, CHUNK
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp does not load it")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._depth = 0
        self._random = np.random.default_rng(0)
        self.name = f"llama.cpp ({llama_cpp.__version__}) {kind}"

    def run(self, case: str, tokens: int, depth: int) -> float:
        """See peer_serve."""
        if depth < self._depth:
            llama_cpp.llama_memory_seq_rm(self._memory, 0, depth, -1)
            self._depth = depth
        self._feed(self._ids(depth - self._depth))
        ids = self._ids(tokens if case == "prefill" else 1)
        start = time.perf_counter()
        self._feed(ids)
        if case == "decode":
            for _ in range(tokens - 1):
                self._feed([int(self.logits().argmax())])
        self.logits()
        return time.perf_counter() - start

    def logits(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """f32[V] after the last token."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def _ids(self, count: int) -> list[int]:
        found: list[int] = self._random.integers(3, self._vocabulary, count).tolist()
        return found

    def _feed(self, ids: list[int]) -> None:
        for at in range(0, len(ids), CHUNK):
            part = ids[at : at + CHUNK]
            array = (ctypes.c_int32 * len(part))(*part)  # the batch keeps only its address
            batch = llama_cpp.llama_batch_get_one(array, len(part))
            status = llama_cpp.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode: status {status}")
            self._depth += len(part)


def gguf_file(checkpoint: Path, kind: str, folder: Path) -> Path:
    """The path of the checkpoint's GGUF of a kind; bf16 first, llama.cpp quantizes that."""
    path = folder / f"{checkpoint.name}-{kind}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    if kind == "bf16":
        write_gguf(checkpoint, part)
    else:
        source = gguf_file(checkpoint, "bf16", folder)
        params = llama_cpp.llama_model_quantize_default_params()
        ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.removesuffix(PURE)}", None)
        if ftype is None:
            raise ValueError(f"llama.cpp has no type {kind}")
        params.ftype, params.pure = ftype, kind.endswith(PURE)
        keep = _silent()
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(part).encode(), ctypes.byref(params)
        )
        del keep
        if status:
            raise RuntimeError(f"llama_model_quantize to {kind}: status {status}")
    part.rename(path)
    return path


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint as GGUF: matrices in bf16, the rest in f32."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    arch = config["model_type"]
    if arch not in ("llama", "qwen2"):
        raise ValueError(f"{checkpoint}: {arch}; GGUF files are made of llama and qwen2 here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, bits in read_bf16(checkpoint):
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = interleaved(bits, heads if "q_proj" in name else kv_heads)
        module, kind = name.rsplit(".", 1)
        if module in OUTER:
            target = OUTER[module]
        else:
            _, _, layer, rest = module.split(".", 3)
            target = f"blk.{layer}.{NAMES[rest]}"
        if bits.ndim == 1:
            writer.add_tensor(f"{target}.{kind}", (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            data = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(f"{target}.{kind}", data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(
    bits: np.ndarray[Any, np.dtype[np.uint16]], heads: int
) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Rows of q or k, uint16[n, k]: a head's two halves -> pairs, as llama.cpp rotates them."""
    n, k = bits.shape
    return bits.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def read_bf16(checkpoint: Path) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.uint16]]]]:
    """(name, bits of bfloat16) of all tensors, mapped."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        whole = np.memmap(path, np.uint8, "r")
        end = 8 + int(whole[:8].view("<u8")[0])
        header = json.loads(bytes(whole[8:end]))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16")
            first, last = (end + at for at in entry["data_offsets"])
            yield name, np.asarray(whole[first:last]).view(np.uint16).reshape(entry["shape"])


def _silent() -> Any:
    """Stop llama.cpp's log; what is returned must be kept."""
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback
