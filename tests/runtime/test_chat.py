"""Chat templates: rendered as transformers does, bounded where it is not; the conversation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.chat import Conversation, find_template, load_template
from qcc.runtime.errors import QccError
from qcc.runtime.template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "  Is 1 < 2? Ünïcode 🍕 "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?\nSay."},
]
TEXTS = {"bos_token": "<s>", "eos_token": "</s>"}
# Templates of our own in the manners of well-known models.
TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' + message['content'] + '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "inst": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = '<<SYS>>\\n' ~ messages[0]['content'] | trim ~ '\\n<</SYS>>\\n\\n' %}
{% else %}{% set loop_messages = messages %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system is defined %}{% set content = system + message.content %}
{% else %}{% set content = message.content %}{% endif %}
{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message.role == 'assistant' %}{{ ' ' ~ content ~ eos_token }}{% endif %}
{% if loop.last and loop.length > 2 %}{{ '' }}{% endif %}
{% endfor %}
""",
    "tools": """{% set ns = namespace(found=false, names=[]) %}
{%- macro block(m) %}<{{ m.role | upper }}>{{ m.content | tojson }}{% endmacro %}
{%- for m in messages if m.role != 'system' %}
{%- set ns.names = ns.names + [m.role] %}
{%- generation %}{{ block(m) }}{% endgeneration %}
{%- if loop.index > 2 %}{% break %}{% endif %}
{%- endfor %}
{{ ns.names | join(',') }} {{ {'a': [1, 'é'], 'b': none} | tojson(indent=2) }}
{%- if tools is not none and tools %}{{ tools }}{% endif %}
{{ '%s-%d' % ('a', 3) }} {{ '{}!'.format('x') }} {{ messages | map(attribute='role') | list }}
{{ strftime_now('%Y') | length }}
{{ messages | selectattr('role', 'equalto', 'user') | list | count }}
""",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendered_as_by_transformers(name: str, prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    compiled = utils._compile_jinja_template(TEMPLATES[name])
    values: dict[str, Any] = {"messages": MESSAGES, "tools": None, "documents": None, **TEXTS}
    expected = compiled.render(add_generation_prompt=prompt, **values)
    assert ChatTemplate(TEMPLATES[name], TEXTS).render(MESSAGES, prompt) == expected


GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}{{ ns.x }}"


def grow(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "steps"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "fails: Recursion"),
        (grow("'a'", "{% set ns.x = ns.x + ns.x %}"), "text too long"),
        (grow("'a'", "{% set ns.x = ns.x ~ ns.x %}"), "text too long"),
        (grow("'a'", "{% set ns.x = [ns.x, ns.x] | join %}"), "text too long"),
        (grow("'a'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), "text too long"),
        (grow("'a'", "{% set ns.x = ns.x | replace('a', 'aa') %}"), "too long"),
        (grow("[1]", "{% set ns.x = ns.x + ns.x %}"), "steps"),
        (grow("[1]", "{% set ns.x = [ns.x, ns.x] %}"), "steps"),
        (grow("[1]", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"), "steps"),
        (grow("2", "{% set ns.x = ns.x * ns.x %}"), "number too large"),
        ("{{ 9 ** 9 ** 9 }}", "power"),
        ("{{ 'a' * 10 ** 10 }}", "text too long"),
        ("{{ 'a'.ljust(10 ** 10) }}", "10000000000 as a size"),
        ("{{ 'a' | center(10 ** 10) }}", "10000000000 as a size"),
        ("{{ '%0999999999d' % 1 }}", "width too large"),
        ("{{ '%0999999999d' | format(1) }}", "width too large"),
        ("{{ '{:999999999d}'.format(1) }}", "width too large"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ lipsum(100) }}", "undefined"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[0].nothing.more }}", "no attribute|has no"),
        ("{{ cycler() }}", "fails: RuntimeError: at least one item"),
        ("{% if %}", "not a valid template"),
        ("{{ " + "1" * 5000 + " }}", "not a valid template"),
    ],
)
def test_a_hostile_or_broken_template_is_one_error(source: str, text: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(QccError, match=text):
        ChatTemplate(source, TEXTS, "here").render(MESSAGES)
    assert time.perf_counter() - begun < 15, "bounded, on a slow machine as well"


def test_the_bounds_are_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(50000) %}{% endfor %}x", {})
    for _ in range(20):
        assert template.render([]) == "x"


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "y"}]
    for source in TEMPLATES.values():
        assert ChatTemplate(source, TEXTS).render(messages * 300)


@pytest.mark.parametrize(
    ("config", "jinja", "expected"),
    [
        ({"chat_template": "A"}, None, "A"),
        ({"chat_template": [{"name": "rag", "template": "R"}]}, None, "R"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "T"},
                    {"name": "default", "template": "D"},
                ]
            },
            None,
            "D",
        ),
        ({"chat_template": [{"name": [], "template": "L"}]}, None, "L"),
        ({"chat_template": "A"}, "J", "J"),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_where_a_template_is_found(
    tmp_path: Path, config: Any, jinja: str | None, expected: str | None
) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    assert find_template(tmp_path)[0] == expected
    if expected is None:
        with pytest.raises(QccError, match="has no chat template"):
            load_template(tmp_path, {})


def test_an_unreadable_configuration_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(QccError, match=r"tokenizer_config\.json: cannot be read"):
        find_template(tmp_path)


def test_a_conversation_grows_and_its_prompt_extends_the_last() -> None:
    conversation = Conversation(ChatTemplate(TEMPLATES["chatml"], TEXTS), system="Be brief.")
    first = conversation.ask("Hi")
    assert first.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    conversation.answer("Hello.")
    second = conversation.ask("Bye")
    assert second.startswith(first + "Hello.")
    conversation.take_back()
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    conversation.reset()
    assert conversation.ask("Hi") == first


def test_a_refused_question_is_not_kept() -> None:
    source = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}"
    conversation = Conversation(ChatTemplate(source, {}))
    conversation.ask("one")
    conversation.answer("1")
    with pytest.raises(QccError, match="enough"):
        conversation.ask("two")
    assert len(conversation.messages) == 2
