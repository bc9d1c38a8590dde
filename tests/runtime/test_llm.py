"""What LLM adds to the scheduler, without a compiled model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qcc.runtime.engine.llm import LLM, sampling_defaults
from qcc.runtime.errors import QccError


def some_llm(chat: dict[str, Any], generation: dict[str, Any]) -> Any:
    llm: Any = object.__new__(LLM)
    llm.artifact = SimpleNamespace(chat_config=chat)
    llm.tokenizer = SimpleNamespace(generation_config=generation)
    return llm


def test_defaults_come_from_the_artifact() -> None:
    chat = {"temperature": 0.8, "top_p": 0.9, "vocab_size": 3}
    generation = {"temperature": 0.1, "top_k": 40, "max_length": 20, "do_sample": False}
    params = some_llm(chat, generation).default_params(top_p=None, seed=None, max_tokens=5)
    assert (params.temperature, params.top_p, params.top_k) == (0.8, 0.9, 40)
    assert (params.seed, params.max_tokens) == (None, 5)
    params = some_llm(chat, generation).default_params(temperature=0.0, top_k=0)
    assert (params.temperature, params.top_k) == (0.0, 0)


def test_a_model_that_does_not_sample_is_greedy() -> None:
    assert sampling_defaults({}, {"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert sampling_defaults({}, {"do_sample": True, "top_k": None}) == {}


def test_defaults_that_cannot_be_are_errors() -> None:
    with pytest.raises(QccError, match="temperature 'hot'"):
        some_llm({"temperature": "hot"}, {}).default_params()


def test_bare_token_ids_are_no_prompts() -> None:
    with pytest.raises(QccError, match="as \\[\\[1, 2, 3\\]\\]"):
        some_llm({}, {}).generate([1, 2, 3])


def test_as_many_params_as_prompts() -> None:
    llm = some_llm({}, {})
    with pytest.raises(QccError, match="1 params for 2 prompts"):
        llm.generate(["a", "b"], [llm.default_params()])
