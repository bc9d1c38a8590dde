"""The tokenizer of the tiny model: byte-level BPE, 1024 tokens, and its chat template.

Every byte has a token, so any text survives encode and decode. Encoding puts BOS in front, as
Llama tokenizers do; the chat template writes BOS itself and is used without that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, END = "<|startoftext|>", "<|endoftext|>", "<|end|>"
SPECIALS = (BOS, EOS, END, "<|system|>", "<|user|>", "<|assistant|>")  # ids 0, 1, 2, ...
VOCAB = 1024
MAX_TOKENS = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the tiny model knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of exactly ``VOCAB`` tokens, learnt from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens instead of {VOCAB}: more text")
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> content of the three files that Hugging Face reads."""
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    special = {
        str(i): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for i, text in enumerate(SPECIALS)
    }  # fmt: skip
    config = {
        "added_tokens_decoder": special,
        "additional_special_tokens": list(SPECIALS[2:]),
        **named,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special_map = {**named, "additional_special_tokens": list(SPECIALS[2:])}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special_map, indent=2) + "\n",
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
