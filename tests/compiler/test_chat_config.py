"""mlc-chat-config.json: its fields, the copied files, and conv_templates against jinja."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcc.compiler.chat_config import NOTE, write_chat_config
from qcc.compiler.config import ModelConfig, RopeConfig, read_json
from qcc.compiler.conv_template import TokenFacts, assemble, derive
from qcc.runtime.errors import QccError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
SIZES = {
    "context_window_size": 64,
    "sliding_window_size": -1,
    "attention_sink_size": -1,
    "prefill_chunk_size": 32,
    "max_batch_size": 2,
}
# Templates in the style of the families, in our own words.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
) + CHATML
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set s = '' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "'[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}{{ '<|start|>' + ('model' if m.role == 'assistant' else "
    "m.role) + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)
WORDS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LAST_TURN_SYSTEM = (  # the system message stands in the last user turn
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (s + '\n\n' if s and loop.last "
    "else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
COUNTED = (  # turns are numbered: no conv_template can say that
    "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}"
)
ADDED = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|start|>")
FACTS = TokenFacts(
    texts={"bos_token": "<s>", "eos_token": "</s>"},
    bos_id=0,
    added={text: index for index, text in enumerate(ADDED)},
    prefix=[0],
    stop_ids=[1],
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
WITH_SYSTEM = [{"role": "system", "content": "Sing."}, *TALK]


def model_config(**changes: Any) -> ModelConfig:
    """A Llama of no size, with changes."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 20,
        "max_position_embeddings": 64,
        "norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope": RopeConfig("default", 10000.0, 4),
    }
    return ModelConfig(**{**values, **changes})


def checkpoint(folder: Path, **files: Any) -> Path:
    """A folder with a byte-level tokenizer of 12 tokens; `files`: name without .json -> content."""
    tokenizer = {
        "added_tokens": [{"id": i, "content": t, "special": True} for i, t in enumerate(ADDED)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {c: 7 + i for i, c in enumerate("abcde")}, "merges": []},
    }
    tokenizer_config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    defaults = {"tokenizer": tokenizer, "tokenizer_config": tokenizer_config}
    folder.mkdir(exist_ok=True)
    for name, content in {**defaults, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write(source: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """write_chat_config of `source` into the new folder `out`."""
    out.mkdir(exist_ok=True)
    return write_chat_config(source, out, model_config(**changes), "q4f16_1", SIZES)


def test_all_fields_are_written(tmp_path: Path) -> None:
    generation = {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "eos_token_id": [3, 1]}
    source = checkpoint(tmp_path / "m", generation_config=generation, config={"eos_token_id": 4})
    chat = write(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text()) == chat
    assert set(chat) == {
        *("version", "model_type", "quantization", "model_config", "vocab_size"),
        *("context_window_size", "sliding_window_size", "prefill_chunk_size"),
        *("attention_sink_size", "tensor_parallel_shards", "pipeline_parallel_stages"),
        *("active_vocab_size", "temperature", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "top_p", "tokenizer_files", "tokenizer_info", "conv_template"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "model_task"),
    }
    assert chat["version"] == "0.1.0"
    assert (chat["vocab_size"], chat["active_vocab_size"]) == (20, 12)
    assert (chat["temperature"], chat["top_p"], chat["repetition_penalty"]) == (0.7, 0.9, 1.0)
    assert (chat["bos_token_id"], chat["eos_token_id"], chat["pad_token_id"]) == (
        0,
        [3, 1, 4],
        None,
    )
    assert chat["conv_template"]["name"] == "plain"
    assert chat["conv_template"]["stop_token_ids"] == [3, 1, 4]
    assert chat["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert chat["model_config"]["rms_norm_eps"] == 1e-5
    assert chat["model_config"]["context_window_size"] == 64


def test_rope_scaling_keeps_hugging_face_names(tmp_path: Path) -> None:
    rope = RopeConfig("llama3", 5e5, 4, factor=8.0, original_max_position_embeddings=8192)
    chat = write(checkpoint(tmp_path / "m"), tmp_path / "out", rope=rope)
    assert chat["model_config"]["rope_theta"] == 5e5
    assert chat["model_config"]["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


def test_only_files_of_known_names_are_copied(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", secrets={"key": 1}, generation_config={})
    (source / "LICENSE.txt").write_text("free")
    (source / "NOTICE").write_text("note")
    (source / "chat_template.jinja").write_text(CHATML)
    chat = write(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("LICENSE.txt", "NOTICE", "chat_template.jinja", "generation_config.json"),
        *("mlc-chat-config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "free"
    assert chat["conv_template"]["name"] == "chat_template"


def test_named_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    config = {"eos_token": "<|im_end|>", "chat_template": templates}
    chat = write(checkpoint(tmp_path / "m", tokenizer_config=config), tmp_path / "out")
    assert chat["conv_template"]["roles"]["user"] == "<|im_start|>user"
    assert chat["eos_token_id"] == 3


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece_info(tmp_path: Path, metaspace: bool) -> None:
    if metaspace:
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
        parts = {"pre_tokenizer": space, "decoder": {"type": "Sequence", "decoders": [space]}}
    else:
        prepend = {"type": "Prepend", "prepend": "▁"}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        parts = {
            "normalizer": {"type": "Sequence", "normalizers": [prepend]},
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, strip]},
        }
    model = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "byte_fallback": True}
    tokenizer = {"added_tokens": [], "model": model, **parts}
    chat = write(checkpoint(tmp_path / "m", tokenizer=tokenizer), tmp_path / "out")
    assert chat["active_vocab_size"] == 2
    assert chat["tokenizer_info"] == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }


def test_the_post_processor_gives_the_prefix(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    tokenizer = read_json(source / "tokenizer.json")
    single = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "special_tokens": {"<s>": {"ids": [0]}},
    }
    chat = write(checkpoint(source, tokenizer=tokenizer), tmp_path / "out")
    assert chat["conv_template"]["system_prefix_token_ids"] == [0]
    off = {"bos_token": "<s>", "add_bos_token": False}
    chat = write(checkpoint(source, tokenizer=tokenizer, tokenizer_config=off), tmp_path / "out")
    assert chat["conv_template"]["system_prefix_token_ids"] == []


@pytest.mark.parametrize(
    ("files", "changes", "text"),
    [
        ({"tokenizer": None}, {}, "only tokenizer.json is supported here"),
        ({"tokenizer": {"model": {}}}, {}, "not a tokenizer of the tokenizers library"),
        ({"tokenizer": [1]}, {}, "holds no JSON object"),
        ({}, {"vocab_size": 11}, "token ids up to 11, but config.json has vocab_size 11"),
        ({"generation_config": {"top_p": 7}}, {}, "top_p is 7, must be from 0 to 1"),
        ({"config": {"eos_token_id": "x"}}, {}, "eos_token_id is 'x', it must be a token id"),
    ],
)
def test_errors(tmp_path: Path, files: Any, changes: Any, text: str) -> None:
    with pytest.raises(QccError, match=text) as info:
        write(checkpoint(tmp_path / "m", **files), tmp_path / "out", **changes)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out" / "mlc-chat-config.json").exists()


def test_a_tokenizer_that_is_no_json(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(QccError, match=r"tokenizer\.json: not valid JSON"):
        write(source, tmp_path / "out")


def test_chatml_field_by_field() -> None:
    conv, note = derive(CHATML, FACTS)
    assert note is None
    assert conv == {
        "name": "chat_template",
        "system_template": "<|im_start|>system\n{system_message}<|im_end|>\n",
        "system_message": "",
        "render_empty_system_message": False,
        "system_prefix_token_ids": [],
        "add_role_after_system_message": True,
        "roles": {
            "user": "<|im_start|>user",
            "assistant": "<|im_start|>assistant",
            "tool": "<|im_start|>user",
        },
        "role_templates": {
            "user": "{user_message}",
            "assistant": "{assistant_message}",
            "tool": "{tool_message}",
        },
        "messages": [],
        "seps": ["<|im_end|>\n"],
        "role_content_sep": "\n",
        "role_empty_sep": "\n",
        "stop_str": [],
        "stop_token_ids": [1, 3],
        "function_string": "",
        "use_function_calling": False,
    }


@pytest.mark.parametrize(
    ("template", "prefix", "without", "with_system"),
    [
        pytest.param(
            CHATML_DEFAULT,
            [],
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
            "<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
            id="chatml-default-system",
        ),
        pytest.param(
            LLAMA2,
            [],
            "<s>[INST] Hi [/INST] Yo </s><s>[INST] Bye [/INST]",
            "<s>[INST] <<SYS>>\nSing.\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] Bye [/INST]",
            id="llama-2",
        ),
        pytest.param(
            LLAMA3,
            [0],
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>system<|end_header_id|>\n\nSing.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            id="llama-3",
        ),
        pytest.param(
            ZEPHYR,
            [],
            "<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
            "<|system|>\nSing.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nBye</s>\n"
            "<|assistant|>\n",
            id="zephyr",
        ),
        pytest.param(
            MISTRAL,
            [0],
            "[INST] Hi[/INST] Yo</s>[INST] Bye[/INST]",
            "[INST] Hi[/INST] Yo</s>[INST] Bye[/INST]",
            id="mistral-ignores-system",
        ),
        pytest.param(
            WORDS,
            [],
            "USER: Hi\nASSISTANT: Yo\n\nUSER: Bye\nASSISTANT:",
            "Sing.\n\nUSER: Hi\nASSISTANT: Yo\n\nUSER: Bye\nASSISTANT:",
            id="words",
        ),
    ],
)
def test_families(template: str, prefix: list[int], without: str, with_system: str) -> None:
    conv, note = derive(template, FACTS)
    assert note is None
    assert conv["system_prefix_token_ids"] == prefix
    assert assemble(conv, TALK) == without
    assert assemble(conv, WITH_SYSTEM) == with_system


def test_a_separator_between_turns_only() -> None:
    template = (
        "{% for m in messages %}{{ '' if loop.first else '|' }}{{ m.role[0] + ':' + m.content }}"
    )
    conv, note = derive(template + "{% endfor %}{{ '|a:' if add_generation_prompt }}", FACTS)
    assert note is None
    assert (conv["roles"]["assistant"], conv["seps"]) == ("|a:", ["", "|"])
    assert assemble(conv, WITH_SYSTEM) == "s:Sing.|u:Hi|a:Yo|u:Bye|a:"


def test_what_ends_a_reply() -> None:
    stops = {
        template: (conv["stop_token_ids"], conv["stop_str"])
        for template in (LLAMA2, LLAMA3, GEMMA, WORDS)
        for conv, _ in [derive(template, FACTS)]
    }
    assert stops == {
        LLAMA2: ([1], []),
        LLAMA3: ([1, 4], []),
        GEMMA: ([1, 5], []),
        WORDS: ([1], ["USER:"]),
    }


@pytest.mark.parametrize("template", [GEMMA, LAST_TURN_SYSTEM])
def test_a_system_message_that_cannot_be_told_is_noted(template: str) -> None:
    conv, note = derive(template, FACTS)
    assert conv["name"] == "chat_template"
    assert conv["system_prefix_token_ids"] == [0]
    assert assemble(conv, TALK)  # without a system message the texts agree: checked by derive
    assert note is not None
    assert note.startswith("conversations with a system message differ from the chat template")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (COUNTED, "no conversation template: conversations without a system message differ"),
        ("{% for %}", "no conversation template: the chat template fails: "),
        ("constant", "no conversation template: the chat template has no regular turns"),
        ("{{ raise_exception('never') }}", "the chat template has no regular turns"),
        ("{{ messages.__class__.__mro__ }}", "the chat template has no regular turns"),
    ],
)
def test_a_template_that_cannot_be_cut_gives_the_plain_one(template: str, text: str) -> None:
    conv, note = derive(template, FACTS)
    assert conv["name"] == "plain"
    assert assemble(conv, WITH_SYSTEM) == "Sing.HiYoBye"
    assert note is not None
    assert text in note
    assert "\n" not in note


def test_the_date_is_noted() -> None:
    conv, note = derive(CHATML_DEFAULT.replace("Be kind.", "{{ strftime_now('%Y') }}"), FACTS)
    assert conv["system_message"].isdigit()
    assert note == "the conversation template holds the date of this compilation"


def test_the_note_is_not_written(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "chat_template": COUNTED}
    chat = write(checkpoint(tmp_path / "m", tokenizer_config=config), tmp_path / "out")
    assert NOTE in chat
    assert NOTE not in json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())


REAL = {
    "tiny": (ROOT / "tutorials" / "tiny" / "model", "byte_level", "chat_template"),
    "stories260K": (SHARED / "models" / "stories260K", "byte_fallback", "plain"),
    "babyllama": (SHARED / "models" / "babyllama-tok361", "byte_fallback", "plain"),
    "llama-spm": (SHARED / "tokenizers" / "llama-spm", "byte_fallback", "plain"),
    "llama-bpe": (SHARED / "tokenizers" / "llama-bpe", "byte_level", "plain"),
    "qwen2": (SHARED / "tokenizers" / "qwen2", "byte_level", "plain"),
}
REAL_SIZES = {
    "stories260K": 512,
    "babyllama": 361,
    "llama-spm": 32000,
    "llama-bpe": 128256,
    "qwen2": 151936,
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(tmp_path: Path, name: str) -> None:
    source, method, conv_name = REAL[name]
    if not (source / "tokenizer.json").is_file():
        pytest.skip(f"{source} is missing")
    chat = write(source, tmp_path / "out", vocab_size=200000)
    spaced = method == "byte_fallback"
    assert chat["tokenizer_info"] == {
        "token_postproc_method": method,
        "prepend_space_in_encode": spaced,
        "strip_space_in_decode": spaced,
    }
    assert chat["conv_template"]["name"] == conv_name
    assert chat["conv_template"]["stop_token_ids"]
    assert chat["active_vocab_size"] == REAL_SIZES.get(name, chat["active_vocab_size"])
    assert NOTE not in chat
