"""sentence-transformers' files: what they say of a model, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qcc.compiler.build import weight_specs
from qcc.compiler.driver import make_plan
from qcc.compiler.options import CompileOptions
from qcc.compiler.read_model import read_model
from qcc.compiler.sizes import SizeFlags, Sizes
from qcc.runtime.errors import QccError

from ..embeddings import BERT, STEPS, save_embedding

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 361,
    "max_position_embeddings": 4096,
}
BERT_CONFIG = {"architectures": ["BertModel"], "model_type": "bert", **BERT}
MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
LENGTHS = "sentence_bert_config.json"
USES = "config_sentence_transformers.json"


def steps(*kinds: str) -> list[dict[str, Any]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    return [{"idx": i, "path": paths.get(k, k), "type": STEPS + k} for i, k in enumerate(kinds)]


USUAL: dict[str, Any] = {
    MODULES: steps("Transformer", "Pooling", "Normalize"),
    POOLING: {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False},
}
Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """folder(config, {file: content}): what is read of a checkpoint before its weights."""

    def make(config: Mapping[str, Any], files: Mapping[str, Any]) -> Path:
        for name, content in {"config.json": config, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


def test_usual_files(folder: Make) -> None:
    prompts = {"query": "Instruct: find\nQuery:", "document": ""}
    uses = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    where = folder(QWEN3, {**USUAL, USES: uses, LENGTHS: {"max_seq_length": 300}})
    _, config, facts = read_model(where)
    assert facts is not None and config.pooling == facts.pooling
    assert facts.as_dict() == {
        "pooling": "last",
        "normalized": True,
        "lower_case": False,
        "prompts": prompts,
        "default_prompt": None,
        "similarity": "cosine",
    }
    assert facts.max_tokens == 300
    assert config.tie_word_embeddings, "an embedding model has no lm_head"


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_poolings(folder: Make, pooling: Any, kind: str) -> None:
    files = {MODULES: steps("Transformer", "Pooling"), POOLING: pooling}
    *_, facts = read_model(folder(QWEN3, files))
    assert facts is not None
    assert (facts.pooling.kind, facts.pooling.normalized) == (kind, False)


def test_what_a_model_is_for(folder: Make) -> None:
    """By its files, the class that its config names, or as the user says."""

    def task(where: Path, asked: str = "auto") -> str | None:
        *_, facts = read_model(where, asked)
        return facts and facts.pooling.kind

    where = folder(QWEN3, {})
    assert task(where) is None and task(where, "embedding") == "last"
    where = folder({**QWEN3, "architectures": ["Qwen3Model"]}, {})
    assert task(where) == "last" and task(where, "generation") is None
    assert task(folder(BERT_CONFIG, {})) == "mean"
    with pytest.raises(QccError, match="bert is an encoder: it writes no text"):
        task(where, "generation")
    where = folder(QWEN3, USUAL)
    assert task(where) == "last" and task(where, "generation") is None


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({MODULES: steps("Transformer", "Pooling", "Dense")}, "step 'Dense' is not implemented"),
        (
            {MODULES: steps("Pooling", "Transformer")},
            r"the steps are \['Pooling', 'Transformer'\]; they",
        ),
        ({MODULES: []}, "the steps are none"),
        ({MODULES: steps("Transformer", *["Pooling"] * 99)}, r"steps are .{57}\.\.\.; they must"),
        ({MODULES: {"a": 1}}, "modules.json: not a list of sentence-transformers' modules"),
        (
            {MODULES: [{**steps("Transformer")[0], "path": "x"}, steps("Pooling")[0]]},
            "the model must lie beside the file",
        ),
        (
            {POOLING: {"pooling_mode_max_tokens": True}},
            r"pooling \['max_tokens'\] is not implemented",
        ),
        ({POOLING: {}}, "pooling none is not implemented"),
        (
            {POOLING: {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            r"pooling \['cls_token', 'mean_tokens'\] is not implemented; supported: one of",
        ),
        ({POOLING: {"pooling_mode": "weightedmean"}}, r"pooling \['weightedmean'\] is not"),
        ({POOLING: {"pooling_mode": "a\nb"}}, r"pooling \['a\\nb'\] is not implemented"),
        ({POOLING: {"pooling_mode": "a" * 100_000}}, r"pooling .{57}\.\.\. is not implemented"),
        ({POOLING: {"pooling_mode": {"a": 1}}}, "pooling .* is not implemented"),
        (
            {POOLING: {"pooling_mode_cls_token": True, "include_prompt": False}},
            "include_prompt false is not implemented",
        ),
        ({POOLING: [1]}, "config.json: not a JSON object"),
        ({LENGTHS: {"max_seq_length": "512"}}, "max_seq_length is '512', it must be a whole"),
        ({USES: {"prompts": ["query"]}}, "prompts must map names to texts"),
        ({USES: {"prompts": {"query": 1}}}, "prompts must map names to texts"),
        ({USES: {"default_prompt_name": "query"}}, "default_prompt_name 'query' is none of its"),
        (
            {USES: {"prompts": {"a": ""}, "default_prompt_name": ["a"]}},
            r"default_prompt_name \['a'\] is none of its prompts",
        ),
        ({USES: {"similarity_fn_name": "angle"}}, "similarity_fn_name 'angle' is not supported"),
        ({USES: 3}, "config_sentence_transformers.json: not a JSON object"),
    ],
)
def test_files_that_are_refused(folder: Make, files: Any, text: str) -> None:
    with pytest.raises(QccError, match=text):
        read_model(folder(QWEN3, {**USUAL, **files}))


def test_tasks_that_are_none(folder: Make) -> None:
    with pytest.raises(QccError, match="task 'generate': it must be one of auto, generation, emb"):
        read_model(folder(QWEN3, {}), "generate")


def test_pooling_file_is_missing(folder: Make) -> None:
    where = folder(QWEN3, USUAL)
    (where / POOLING).unlink()
    with pytest.raises(QccError, match=r"1_Pooling/config.json: no such file"):
        read_model(where)


def sizes(where: Path, **flags: int) -> Sizes:
    options = CompileOptions(sizes=SizeFlags(**flags))
    return make_plan(where, options, 64).sizes


def test_sizes(folder: Make) -> None:
    """A text is computed whole: a pass takes as many tokens as the longest has, or more."""

    def of(where: Path, **flags: int) -> tuple[int, int, int]:
        found = sizes(where, **flags)
        assert (found.sliding_window_size, found.attention_sink_size) == (-1, -1)
        return found.context_window_size, found.prefill_chunk_size, found.max_batch_size

    where = folder(QWEN3, USUAL)
    assert of(where) == (2048, 2048, 32)
    assert of(where, context_window=4096, max_batch=5) == (4096, 4096, 5)
    assert of(where, prefill_chunk=100) == (100, 100, 32)
    assert of(where, context_window=50, prefill_chunk=100) == (50, 100, 32)
    assert of(folder(QWEN3, {**USUAL, LENGTHS: {"max_seq_length": 256}})) == (256, 256, 32)
    where.joinpath(LENGTHS).unlink()
    windowed = {**QWEN3, "architectures": ["MistralModel"], "model_type": "mistral"}
    assert of(folder({**windowed, "sliding_window": 24}, USUAL)) == (2048, 2048, 32)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"context_window": 4097}, "--context-window 4097 exceeds the 4096 positions"),
        ({"context_window": 64, "prefill_chunk": 63}, "--prefill-chunk 63: an embedding model"),
        ({"sliding_window": 64}, "--sliding-window: an embedding model sees each text whole"),
        ({"attention_sink": 1}, "--attention-sink: an embedding model"),
        ({"max_batch": 0}, "--max-batch 0: must be 1 or more"),
    ],
)
def test_sizes_that_are_refused(folder: Make, flags: dict[str, int], text: str) -> None:
    with pytest.raises(QccError, match=text):
        sizes(folder(QWEN3, USUAL), **flags)


def test_windows_of_all_layers(folder: Make) -> None:
    """No cache rolls; the layers keep their window."""
    fields = {**QWEN3, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    _, config, _ = read_model(folder({**fields, "sliding_window": 24}, USUAL))
    assert (config.sliding_window, config.layer_window) == (None, 24)
    assert config.windowed == (True, True)


def test_names_without_their_first_part(folder: Make) -> None:
    """As a class without a head writes them; half of the names are not half of a model."""
    where = folder(QWEN3, USUAL)
    for names, table in (
        (["embed_tokens.weight"], "embed_tokens.weight"),
        (["model.embed_tokens.weight"], "model.embed_tokens.weight"),
        (["x"], "model.embed_tokens.weight"),
    ):
        architecture, config, _ = read_model(where, names=names)
        (source,) = architecture.source(config, architecture.embedding, (361, 64)).sources
        assert source.name == table


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder true is not supported"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"embedding_size": 32}, "unknown key 'embedding_size'"),
        ({"architectures": ["BertForSequenceClassification"]}, "architecture 'BertForSeq"),
        ({"architectures": ["DebertaModel"], "model_type": "deberta"}, "architecture 'DebertaMod"),
        (
            {"architectures": ["RobertaModel"], "model_type": "roberta", "pad_token_id": 200},
            "max_position_embeddings 128 leaves no position behind pad_token_id 200",
        ),
    ],
)
def test_configs_that_are_refused(folder: Make, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(QccError, match=text):
        read_model(folder({**BERT_CONFIG, **changes}, {}))


def test_recurrent_models_make_no_embeddings(folder: Make) -> None:
    from qcc.tutorials.random_checkpoint import small_config

    with pytest.raises(QccError, match="qwen3_next is recurrent: it makes no embeddings"):
        read_model(folder(small_config("qwen3_next"), {}), "embedding")


def test_compile_refuses_methods_with_text(cli: Any, tmp_path: Path) -> None:
    """Before anything is built; and tune, which compares logits."""
    where = save_embedding(tmp_path, "bert", BERT, None)
    text = cli("compile", where, "--method", "gptq", "-o", tmp_path / "out").error()
    assert "an embedding model is not calibrated yet: use a method without text" in text
    text = cli("tune", where, "--target-bpw", "4", "-o", tmp_path / "t.yaml").error()
    assert "an embedding model is not tuned" in text


def test_another_task_in_the_folder(cli: Any, checkpoint: Any, tmp_path: Path) -> None:
    """The same weights and sizes, but not the same use."""
    model, out = checkpoint("llama"), tmp_path / "out"
    fixed = ("--context-window", "64", "--prefill-chunk", "64", "--max-batch", "4", "-o", out)
    assert cli("convert", model, *fixed).status == 0
    text = cli("convert", model, "--task", "embedding", *fixed).error()
    assert "another task (chat, now embedding)" in text
    assert cli("convert", model, *fixed).status == 0


@pytest.mark.parametrize("scheme", ["q2f16_km", "q3f16_km", "q4f16_km"])
def test_mixed_schemes_know_the_layers_of_bert(folder: Make, scheme: str) -> None:
    """Values and the MLP's second layer have more bits than queries and its first, as elsewhere."""
    plan = make_plan(folder(BERT_CONFIG, {}), CompileOptions(quant=scheme), 64)
    bits = {spec.name: spec.format.bits or 0 for spec in weight_specs(plan)}
    for part, other in (("value", "query"), ("down_proj", "up_proj")):
        more, fewer = (
            [found for name, found in bits.items() if f".{each}.weight" in name]
            for each in (part, other)
        )
        assert len(more) == len(fewer) == BERT["num_hidden_layers"]
        assert min(more) > max(fewer) > 0
