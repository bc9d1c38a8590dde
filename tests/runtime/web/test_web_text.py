"""Text, tokens and prompts: the page's library has them as the Python runtime has."""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.engine.detokenize import Detokenizer
from qcc.runtime.engine.stop import StopStrings
from qcc.runtime.engine.tokenizer import Tokenizer
from qcc.runtime.errors import QccError
from qcc.runtime.template import ChatTemplate

Ask = Callable[[str, Any], Any]
ODD = [
    *(
        "",
        " ",
        "  a",
        "a  b\n\n\tc  ",
        "héllo wörld ñ",
        "你好，世界！今天",  # noqa: RUF001
        "e\u0301 vs é",
        "x" * 300,
    ),
    *("😀👨‍👩‍👧 family", "<s>hi</s> x", "<|im_start|>user\nhi<|im_end|>\n", "1234567 3.14 0xFF"),
    *("don't I'll WE'RE", "\u00a0nbsp\u200bzw", "a\x00b", "ﬁ ligature ①", "\r\n\r\nx", "⅓½²"),
    *("हिन्दी भाषा", "مرحبا بالعالم", "▁under▁score", " " * 50 + "y", "\n" * 20, "<|eot_id|>hello"),
]
FOLDERS = ["llama-bpe", "llama-spm", "qwen2", "stories260K", "babyllama-tok361", "tiny"]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, shared: Path, bundled: Path) -> Path:
    """Byte-level and sentencepiece tokenizers, with and without byte fallback."""
    if request.param == "tiny":
        return bundled
    found = [shared / kind / request.param for kind in ("tokenizers", "models")]
    return next(path for path in found if path.is_dir())


@pytest.fixture
def some_texts(shared: Path) -> list[str]:
    """Lines and long stretches of the shared texts, and oddities."""
    texts = list(ODD)
    for path in sorted((shared / "text").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        texts += random.Random(0).sample(lines, min(40, len(lines)))
        texts.append(text[10_000:13_000])
    return texts


def test_tokens(ask: Ask, folder: Path, some_texts: list[str]) -> None:
    """Encoding with and without special tokens, and cut to a window."""
    chat = {"eos_token_id": [2, 5], "bos_token_id": 1}
    mine = Tokenizer(folder, chat)
    found = ask("tokens", {"folder": str(folder), "texts": some_texts, "chat": chat})
    assert found["bos"] == mine.bos_id
    assert found["eos"] == sorted(mine.eos_ids)
    for text, encoded, rendered, within in zip(
        some_texts, found["encoded"], found["rendered"], found["within"], strict=True
    ):
        assert encoded == mine.encode(text or " "), text
        assert rendered == mine.encode_rendered(text), text
        assert (within["ids"], within["count"]) == mine.encode_within(text or " ", 9), text


def test_texts_of_random_tokens(ask: Ask, folder: Path) -> None:
    """Decoding, where bytes are no UTF-8 too."""
    mine = Tokenizer(folder, {})
    rng = random.Random(3)
    size = mine.backend.get_vocab_size()
    ids = [[rng.randrange(min(size, 600) if i % 2 else size) for _ in range(8)] for i in range(400)]
    assert ask("texts", {"folder": str(folder), "ids": ids}) == [mine.decode(each) for each in ids]


def test_pieces(ask: Ask, folder: Path, some_texts: list[str]) -> None:
    """Streaming: the same piece after every token, and no character is cut."""
    mine = Tokenizer(folder, {})
    rng = random.Random(4)
    size = mine.backend.get_vocab_size()
    cases, wanted = [], []
    for text in some_texts[:60]:
        ids = mine.encode_rendered(text)
        cut = rng.randrange(len(ids) + 1)
        cases.append({"prompt": ids[:cut], "tokens": ids[cut:]})
    for _ in range(60):
        ids = [rng.randrange(min(size, 600)) for _ in range(20)]
        cases.append({"prompt": ids[:7], "tokens": ids[7:]})
    for case in cases:
        detokenizer = Detokenizer(mine.backend, case["prompt"])
        wanted.append([*map(detokenizer.push, case["tokens"]), detokenizer.finish()])
    assert ask("pieces", {"folder": str(folder), "cases": cases}) == wanted


def test_stop_strings(ask: Ask) -> None:
    """Random texts over a small alphabet, in random pieces."""
    rng = random.Random(5)
    cases, wanted = [], []
    for index in range(2000):
        letters = ["ab", "ab😀"][index % 2]
        stops = ["".join(rng.choices(letters, k=rng.randrange(1, 6))) for _ in range(index % 4)]
        pieces = ["".join(rng.choices("ab😀c", k=rng.randrange(7))) for _ in range(8)]
        cases.append({"stops": stops, "include": index % 3 == 0, "pieces": pieces})
        mine = StopStrings(stops, index % 3 == 0)
        wanted.append([*map(mine.push, pieces), mine.finish()])
    assert ask("stops", cases) == wanted


CALL = {"type": "function", "function": {"name": "temperature", "arguments": {"city": 'Pa"ris'}}}
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <there>, é 😀"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?\n Two"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "And  three"},
    ],
    [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL], "reasoning": "I ask."},
        {"role": "tool", "content": "12"},
        {"role": "tool", "content": "13"},
    ],
    [{"role": "nobody", "content": "x"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
]


def constants(name: str) -> dict[str, Any]:
    """What a test module of the Python side defines in capitals."""
    found = runpy.run_path(str(Path(__file__).parents[2] / name))
    return {key: value for key, value in found.items() if key.isupper()}


def templates() -> list[str]:
    """Those of the Python runtime's tests: in the ways of many models."""
    named = dict(constants("runtime/test_chat.py")["TEMPLATES"])
    del named["tools"]  # formats texts as Python does, which the npm package refuses
    values = [*named.values(), *constants("runtime/test_template_tools.py")["TEMPLATES"].values()]
    values += constants("compiler/test_conv_template.py").values()
    return [text for text in values if isinstance(text, str) and "{%" in text]


def test_chat_templates(ask: Ask, bundled: Path) -> None:
    """The same prompt, or both refuse."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    sources = templates()
    tiny = Tokenizer(bundled, {})
    sources.append(tiny.config["chat_template"])
    assert len(sources) > 12
    choices: list[dict[str, Any]] = [
        {},
        {"tools": constants("runtime/test_template_tools.py")["TOOLS"]},
        {"variables": {"enable_thinking": False}, "add_generation_prompt": False},
    ]
    cases, wanted = [], []
    for source in sources:
        for messages in TALKS:
            for options in choices:
                case = {"source": source, "special": special}
                cases.append({**case, "messages": messages, "options": options})
                wanted.append(rendered(source, special, messages, options))
    for case, mine, found in zip(cases, wanted, ask("templates", cases), strict=True):
        assert found.get("text") == mine, (case, found)


def test_what_the_templates_package_lacks_is_refused(ask: Ask) -> None:
    """Never rendered as something else."""
    source = constants("runtime/test_chat.py")["TEMPLATES"]["tools"]
    case = {"source": source, "special": {}, "messages": TALKS[0], "options": {}}
    broken = {**case, "source": "{% for x in y"}
    found = ask("templates", [case, broken])
    assert "the chat template refuses" in found[0]["error"]
    assert "the chat template is not valid" in found[1]["error"]


def rendered(source: str, special: Any, messages: Any, options: dict[str, Any]) -> str | None:
    """What Python makes of it; None: it refuses."""
    rest = {key: value for key, value in options.items() if key != "variables"}
    try:
        template = ChatTemplate(source, special)
        return template.render(messages, **rest, **options.get("variables", {}))
    except QccError:
        return None
