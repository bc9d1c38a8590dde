"""IRModule + target -> library: the passes of pipeline.py around a TargetSpec."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcc.compiler.config import ModelConfig
from qcc.compiler.embedding import EmbeddingFacts
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.rope import frequencies
from qcc.compiler.sizes import Sizes
from qcc.compiler.weights.spec import SourceTensor, WeightSpec
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import FLOAT_DTYPES, WeightFormat
from qcc.quant_schemes.scheme import Scheme
from qcc.runtime.errors import QccError
from qcc.targets.spec import (
    PAGE_SIZE,
    BuildOptions,
    KVCacheConfig,
    KVStorage,
    TargetSpec,
    Tell,
)

METADATA_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a library computes, chosen before anything is built."""

    architecture: Architecture
    config: ModelConfig
    scheme: Scheme
    sizes: Sizes
    active_vocab_size: int | None = None  # ids that the tokenizer has; None: all of vocab_size
    embedding: EmbeddingFacts | None = None  # None: the model generates text

    @property
    def task(self) -> str:
        """`model_task`, as clients name it."""
        return "chat" if self.embedding is None else "embedding"


def weight_specs(plan: Plan) -> tuple[WeightSpec, ...]:
    """Every weight of the model in parameter order, with sources and formats.

    A fused weight whose sources have different formats is stored as these sources. Where a scheme
    rounds activations with static scales, each quantized linear layer and lm_head stores its own; a
    table that is the embedding as well has none, and multiplies with x as it is.

    Raises:
        SchemeError: a rule of the scheme matches nothing that it could quantize, or a part of what
            has one format.
    """
    from qcc.compiler.models.decoder import parameters

    architecture, config, scheme = plan.architecture, plan.config, plan.scheme
    specs: list[WeightSpec] = []
    names: list[tuple[list[str], str, int]] = []
    for name, shape in parameters(architecture.module(config)):
        made = architecture.source(config, name, shape)
        role, ndim = architecture.role(name, shape), len(shape)
        names.append(([name, *(s.name for s in made.sources if s.name != name)], role, ndim))
        formats = [
            scheme.format_of(source.name, role=role, ndim=ndim, fused=name)
            for source in made.sources
        ]
        if len(set(formats)) == 1 or made.transform is not None:
            fmt = scheme.format_of(name, role=role, ndim=ndim, fused=made.sources[0].name)
            whole = WeightSpec(name, shape, fmt, made.sources, made.transform, role)
            specs.append(dataclasses.replace(whole, whole=made.whole))
            continue
        if made.whole:
            raise SchemeError(
                f"{scheme.name}: {name} holds all experts of its layer in one format, but the "
                f"rules give two to {_two_formats(made.sources, formats)}; use wildcards that "
                "match the gate and up projections of every expert, or none"
            )
        for source, fmt in zip(made.sources, formats, strict=True):
            specs.append(WeightSpec(source.name, source.shape, fmt, (source,), None, role, name))
    scheme.check(names)
    if scheme.activations != "static":
        return tuple(specs)
    return tuple(
        dataclasses.replace(spec, input_scale=True)
        if spec.role in ("linear", "lm_head") and not spec.format.is_float
        else spec
        for spec in specs
    )


def check_dtypes(plan: Plan, specs: Sequence[WeightSpec], target: TargetSpec) -> None:
    """Refuse floating dtypes that a target's kernels have not.

    Raises:
        QccError: names one and what has it.
    """
    compute = target.compute_dtype or plan.scheme.dtype
    found = [(f"the scheme {plan.scheme.name} computes in", compute)]
    found += [(f"{p.name} is stored in", p.dtype) for spec in specs for p in spec.stored]
    for what, dtype in found:
        if dtype in FLOAT_DTYPES and dtype not in target.dtypes:
            raise QccError(
                f"--target {target.name}: {what} {dtype}, which its kernels have not; take a "
                "scheme in float16 or float32, as q4f16_1 or q4f32_1"
            )


def _two_formats(sources: Sequence[SourceTensor], formats: Sequence[WeightFormat]) -> str:
    """Two of the sources, whose formats differ."""
    other = next(i for i, fmt in enumerate(formats) if fmt != formats[0])
    return f"{sources[0].name} and {sources[other].name}"


def kv_cache_config(plan: Plan, dtype: str) -> KVCacheConfig:
    """What the paged KV cache is made for."""
    config, sizes = plan.config, plan.sizes
    if sizes.sliding_window_size > 0 and (config.rotates_in_graph or config.layer_window):
        raise QccError(
            f"--sliding-window: the layers of {config.model_type} differ in windows or rotation, "
            "so its cache keeps all tokens; give --context-window"
        )
    inv_freq, factor = frequencies(config.rope, _rope_length(plan))
    if config.rotates_in_graph or plan.embedding is not None:
        inv_freq, factor = (), 1.0
    return KVCacheConfig(
        num_hidden_layers=len(config.cache_layers),
        num_attention_heads=_cache_heads(config),
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary_dim=2 * len(inv_freq),
        inv_freq=inv_freq,
        rope_attention_factor=factor,
        max_positions=sizes.max_positions,
        sliding_window_size=sizes.sliding_window_size,
        attention_sink_size=max(sizes.attention_sink_size, 0),
        prefill_chunk_size=sizes.prefill_chunk_size,
        dtype=dtype,
        layer_window=config.layer_window,
        logit_soft_cap=config.attention_soft_cap,
        returns_lse=config.attention_sinks,
    )


def _cache_heads(config: ModelConfig) -> int:
    """Query heads of the cache: with sinks each kv head has one more, for log-sum-exps."""
    return config.num_attention_heads + config.attention_sinks * config.num_key_value_heads


def _rope_length(plan: Plan) -> int:
    """Tokens that rope types which depend on the length are made for."""
    length = plan.sizes.context_window_size
    return length if length > 0 else plan.config.max_position_embeddings


def quantized_module(
    plan: Plan,
    specs: tuple[WeightSpec, ...],
    spec: TargetSpec,
    target: Any,
    dump: Path | None = None,
) -> Any:
    """The module with all that clients call, before any lowering: the executable reference."""
    from qcc.compiler.models.decoder import export
    from qcc.compiler.passes import pipeline
    from qcc.compiler.passes.attach_kv_cache import AttachKVCache
    from qcc.compiler.passes.attach_logit_processing import AttachLogitProcessing
    from qcc.compiler.passes.attach_sampling import AttachSampling
    from qcc.compiler.passes.attach_text_attention import AttachTextAttention
    from qcc.compiler.passes.quantize_activations import QuantizeActivations
    from qcc.compiler.passes.quantize_weights import QuantizeWeights

    dtype = spec.compute_dtype or plan.scheme.dtype
    kv = kv_cache_config(plan, dtype)
    kernels = spec.kv_kernels(kv, target)
    stored = QuantizeWeights(specs, dtype), QuantizeActivations(plan.scheme.activations, specs)
    if plan.embedding is not None:
        causal = not plan.config.bidirectional
        passes = pipeline.texts_front_end(
            *stored, AttachTextAttention(kernels.prefill_ragged, causal)
        )
    else:
        passes = pipeline.front_end(
            *stored,
            AttachKVCache(kv, kernels, spec.kv_storages(kv, target)),
            AttachSampling(plan.config.vocab_size, plan.sizes.max_batch_size),
            AttachLogitProcessing(plan.config.vocab_size),
        )
    config = dataclasses.replace(plan.config, rope_length=_rope_length(plan))
    module = export(plan.architecture.module(config), dtype)
    return pipeline.run(module, passes, target, dump)


def build_library(
    plan: Plan,
    specs: tuple[WeightSpec, ...],
    spec: TargetSpec,
    options: BuildOptions,
    path: Path,
    dump: Path | None = None,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Compile for one target and write the library at `path`; returns what a machine must have."""
    import tvm
    from tvm import relax as rx

    from qcc.compiler.passes import pipeline
    from qcc.compiler.passes.attach_metadata import AttachMetadata
    from qcc.compiler.passes.hoist_repack import HoistRepack

    target, _ = spec.resolve(options)
    hoist = HoistRepack()

    def describe(usage: dict[str, int]) -> dict[str, Any]:
        made = _metadata(plan, specs, spec, target, hoist, usage)
        made["qcc"]["precision"] = options.precision
        return made

    bounds = {"n": plan.sizes.prefill_chunk_size, "b": plan.sizes.max_batch_size}
    heads = [storage.num_attention_heads for storage in _storages(plan, spec, target)]
    bounds["kv"] = max(heads, default=1)
    passes = pipeline.lowering(
        bounds,
        spec.passes("lower", target, options.opt),
        hoist,
        spec.passes("schedule", target, options.opt),
        AttachMetadata(describe),
        fuse=options.opt >= 2,
    )
    module = quantized_module(plan, specs, spec, target, dump)
    module = pipeline.run(module, passes, target, dump)
    spec.check(module)
    with target, tvm.transform.PassContext(disabled_pass=list(spec.needless_passes)):
        executable = rx.build(module, target, relax_pipeline=None)
    return {**spec.requires(target), **spec.export(executable, path, options, tell)}


def _metadata(
    plan: Plan,
    specs: tuple[WeightSpec, ...],
    spec: TargetSpec,
    target: Any,
    hoist: Any,
    usage: dict[str, int],
) -> dict[str, Any]:
    """The object of `_metadata()`: CONTRACTS section 4, and ours under `qcc`."""
    config, sizes = plan.config, plan.sizes
    stored = [part for weight in specs for part in weight.stored]
    dtype = spec.compute_dtype or plan.scheme.dtype
    slots = [
        {
            "name": slot.setting or stored[slot.sources[0]].name,
            "shape": list(slot.shape),
            "dtype": slot.dtype,
            "from": [stored[i].name for i in slot.sources],
            "repack": slot.repack,
            "setting": slot.setting,
        }
        for slot in hoist.slots
    ]
    return {
        "model_type": config.model_type,
        "quantization": plan.scheme.name,
        **sizes.as_dict(),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "kv_state_kind": _state_kind(plan),
        "active_vocab_size": plan.active_vocab_size or config.vocab_size,
        "model_task": plan.task,
        "params": [
            {
                "name": part.name,
                "shape": list(part.shape),
                "dtype": part.dtype,
                "preprocs": [],
                "pipeline_stages": [0],
            }
            for part in stored
        ],
        "kv_cache": _cache_sizes(plan),
        "memory_usage": usage,
        "qcc": {
            "format": METADATA_FORMAT,
            "target": spec.name,
            "arch": str(target.attrs.get("mcpu", "")),
            "compute_dtype": dtype,
            "extents": hoist.extents,
            "kv_storages": {
                storage.name: {
                    "query_heads": storage.num_attention_heads,
                    "token_values": 2 * storage.num_key_value_heads * storage.head_dim,
                }
                for storage in _storages(plan, spec, target)
            },
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "page_size": PAGE_SIZE,
            "rope_table_bytes": _rope_table_bytes(plan),
            "slots": slots,
            "states": [{"name": s.name, "shape": list(s.shape)} for s in config.states],
            "rope": dataclasses.asdict(config.rope),
        },
    }


def _storages(plan: Plan, spec: TargetSpec, target: Any) -> tuple[KVStorage, ...]:
    """How the KV cache can keep keys and values, the compute dtype first; () without a cache."""
    if plan.embedding is not None:
        return ()
    kv = kv_cache_config(plan, spec.compute_dtype or plan.scheme.dtype)
    name = {"float32": "f32", "float16": "f16"}.get(kv.dtype, kv.dtype)
    plain = KVStorage(name, kv.num_attention_heads, kv.num_key_value_heads, kv.head_dim)
    return spec.kv_storages(kv, target) or (plain,)


def _state_kind(plan: Plan) -> str:
    """What sequences keep, as clients name it."""
    if plan.embedding is not None:
        return "none"
    return "hybrid" if plan.config.states else "kv_cache"


def _cache_sizes(plan: Plan) -> dict[str, int]:
    """Of the KV cache; an embedding model has none, so one of no layers and no heads."""
    config = plan.config
    sizes = {
        "num_hidden_layers": len(config.cache_layers),
        "num_attention_heads": _cache_heads(config),
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }
    return sizes if plan.embedding is None else dict.fromkeys(sizes, 0)


def _rope_table_bytes(plan: Plan) -> int:
    """Cosines and sines of every position, in f32; a sliding window computes them on the fly."""
    if plan.sizes.sliding_window_size > 0 or plan.config.rotates_in_graph or plan.embedding:
        return 0
    return plan.sizes.max_positions * plan.config.rope.rotary_dim * (FLOAT_DTYPES["float32"] // 8)
