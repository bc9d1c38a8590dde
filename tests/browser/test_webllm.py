"""Stock WebLLM from npm, unchanged, runs our artifacts in Chromium: the processor's numbers.

Wherever tokens are the likeliest ones, each is checked against the logits that the processor
computes for what stands before it: with two logits closer than rounding either may come.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import outside_tools

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
WEBLLM = HERE.parent / "web" / "node_modules" / "@mlc-ai" / "web-llm" / "lib" / "index.js"
CONTEXT = 40  # of the engine that most tests share; the artifact's is 512
WINDOW = {"sliding_window": 24, "attention_sink": 4, "prefill_chunk": 16}
TALK = [{"role": "user", "content": "Tell me a story about a boat."}]
Change = Callable[[Any, list[int]], Any]


@dataclass(frozen=True)
class Reference:
    """The same artifact on the processor, in float32."""

    llm: Any
    tolerance: float

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation by the checkpoint's own chat template."""
        from qcc.runtime.chat import load_template

        tokenizer = self.llm.tokenizer
        template = load_template(self.llm.artifact.folder, tokenizer.special_texts())
        ids: list[int] = tokenizer.encode_rendered(template.render(messages, True))
        return ids

    def rows(self, before: list[int], tokens: Sequence[int]) -> Any:
        """f64[len(tokens) + 1, V]: the logits for each token, and for the one after them."""
        return self.llm.logits([*before, *tokens])[len(before) - 1 :].astype(np.float64)

    def check(self, before: list[int], told: Any, change: Change = lambda row, _: row) -> None:
        """Each token is the likeliest, `change(logits, tokens so far)` having been done.

        The text is theirs, and an end that no limit set is that of an end token.
        """
        tokens = told["tokens"]
        rows = self.rows(before, tokens)
        for i, row in enumerate(rows):
            changed = change(row, tokens[:i])
            best = changed.max() - 2 * self.tolerance
            if i < len(tokens):
                assert changed[tokens[i]] >= best, f"token {i} of {tokens}"
            elif told["finish"] == "stop":
                assert max(changed[sorted(self.llm.tokenizer.eos_ids)]) >= best
        assert told["text"] == self.llm.tokenizer.decode(tokens)


@dataclass(frozen=True)
class Loaded:
    """A page with WebLLM and a model in it."""

    page: Any
    reference: Reference
    console: list[str]  # warnings, errors

    def ask(self, messages: Any = TALK, **request: Any) -> Any:
        """What webllm.mjs's `ask` returns; greedy unless a temperature is given."""
        asked = {"temperature": 0, "max_tokens": 8, **request}
        if "prompt" not in asked:
            asked["messages"] = messages
        return self.page.evaluate("(request) => ask(request)", asked)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, serve: Callable[[Path], str]) -> str:
    """The URL of a page with WebLLM."""
    if not WEBLLM.is_file():
        pytest.skip("needs @mlc-ai/web-llm (npm install --no-package-lock --prefix tests/web)")
    folder = tmp_path_factory.mktemp("client")
    for name in ("webllm.html", "webllm.mjs"):
        shutil.copy(HERE / name, folder)
    shutil.copy(WEBLLM, folder / "web-llm.js")
    return f"{serve(folder)}webllm.html"


Open = Callable[..., Loaded]


@pytest.fixture(scope="module")
def opened(
    chromium: Any,
    client: str,
    serve: Callable[[Path], str],
    bundled: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tolerance: float,
) -> Iterator[Open]:
    """opened(sizes, **options of webllm.mjs's loadEngine): the bundled model in a page."""
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.sizes import SizeFlags
    from qcc.runtime import LLM
    from qcc.targets.spec import BuildOptions, PackageOptions
    from qcc.targets.webgpu.package import package_site

    contexts = []

    def start(sizes: dict[str, int], **options: Any) -> Loaded:
        artifact, site = (tmp_path_factory.mktemp("tiny") / name for name in ("model", "site"))
        compiling = CompileOptions(
            quant="q4f32_1",
            sizes=SizeFlags(**sizes),
            targets=("cpu", "webgpu"),
            build=BuildOptions(precision="high"),
        )
        with outside_tools():
            compile_model(str(bundled), artifact, compiling)
            package_site(PackageOptions(artifact, site))
        contexts.append(chromium.new_context())
        page = contexts[-1].new_page()
        told: list[str] = []
        page.on(
            "console",
            lambda m: told.append(m.text) if m.type in ("warning", "error") else None,
        )
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(client)
        page.evaluate("([url, options]) => loadEngine(url, options)", [serve(site), options])
        llm = LLM(artifact, precision="high", kv="f32")
        return Loaded(page, Reference(llm, tolerance), told)

    yield start
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def loaded(opened: Open) -> Loaded:
    """The engine of most tests; its context is cut."""
    return opened({}, overrides={"context_window_size": CONTEXT})


@pytest.fixture(scope="module")
def sliding(opened: Open) -> Loaded:
    """An engine that keeps the first tokens and a window, and prefills in chunks."""
    return opened(WINDOW, watch=True)


def test_greedy_text_up_to_the_context(loaded: Loaded) -> None:
    """The processor's tokens until a context that is not the compiled one is full."""
    prompt = loaded.reference.prompt(TALK)
    told = loaded.ask(max_tokens=None, ignore_eos=True)
    assert told["usage"]["prompt_tokens"] == len(prompt) - 1  # WebLLM does not count the BOS
    assert told["finish"] == "length"
    assert len(prompt) + len(told["tokens"]) == CONTEXT + 1  # the last one is not computed with
    loaded.reference.check(prompt, told)


def test_a_prompt_beyond_the_context(loaded: Loaded) -> None:
    """WebLLM's own refusal, by the size that was asked for; it answers on."""
    long = [{"role": "user", "content": "boat " * CONTEXT}]
    told = loaded.page.evaluate("(m) => refused({ messages: m })", long)
    assert told.startswith("ContextWindowSizeExceededError") and str(CONTEXT) in told
    assert loaded.ask(max_tokens=1)["tokens"]


def test_streaming(loaded: Loaded) -> None:
    """The pieces are the text that comes without streaming; a system message leads."""
    messages = [{"role": "system", "content": "Be brief."}, *TALK]
    whole = loaded.ask(messages)
    parts = loaded.ask(messages, stream=True, stream_options={"include_usage": True})
    assert parts["text"] == whole["text"] and len(parts["pieces"]) > 4
    assert len(whole["tokens"]) == 8 and whole["finish"] == parts["finish"] == "length"
    assert parts["usage"]["completion_tokens"] == 8
    loaded.reference.check(loaded.reference.prompt(messages), whole)


def test_a_text_without_a_conversation(loaded: Loaded) -> None:
    """The completions API, which writes the prompt as it stands."""
    told = loaded.ask(prompt="Once upon a time", max_tokens=4)
    prompt = loaded.reference.llm.tokenizer.encode_rendered("Once upon a time")
    loaded.reference.check(prompt, told)


def test_a_second_turn(loaded: Loaded) -> None:
    """From the cache what WebLLM leaves there; anew what our own chat makes of the messages."""
    reference = loaded.reference
    first = loaded.ask(stop=["upon"])
    assert first["finish"] == "stop" and first["text"] == "Once "
    said = {"role": "assistant", "content": first["text"]}
    both = [*TALK, said, {"role": "user", "content": "And then?"}]
    added = reference.llm.tokenizer.encode_rendered("<|user|>And then?<|end|><|assistant|>")

    kept = loaded.ask(both, fresh=False)
    # WebLLM computes the new messages alone, and leaves out the token that ends an answer.
    assert kept["usage"]["prompt_tokens"] == len(added)
    held = [*reference.prompt(TALK), *first["tokens"][:-1]]
    reference.check([*held, *added], kept)

    anew = loaded.ask(both)
    prompt = reference.prompt(both)
    assert anew["usage"]["prompt_tokens"] == len(prompt) - 1
    reference.check(prompt, anew)


def test_logit_bias(loaded: Loaded) -> None:
    """A token is forced, another one banned."""
    assert loaded.ask(logit_bias={"600": 100}, max_tokens=3)["tokens"] == [600] * 3
    prompt = loaded.reference.prompt(TALK)
    first = int(loaded.reference.rows(prompt, [])[0].argmax())

    def banned(row: Any, said: list[int]) -> Any:
        return row - 100 * (np.arange(len(row)) == first)

    told = loaded.ask(logit_bias={str(first): -100})
    assert first not in told["tokens"]
    loaded.reference.check(prompt, told, banned)


def test_penalties(loaded: Loaded) -> None:
    """CONTRACTS section 4: presence and frequency are subtracted, then repetition scales."""

    def penalized(row: Any, said: list[int]) -> Any:
        counts = np.bincount(said, minlength=len(row))
        lower = row - 0.3 * counts - 0.7 * (counts > 0)
        scaled = np.where(lower < 0, lower * 2, lower / 2)
        return np.where(counts > 0, scaled, row)

    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 2}
    told = loaded.ask(max_tokens=10, **penalties)
    prompt = loaded.reference.prompt(TALK)
    loaded.reference.check(prompt, told, penalized)
    with pytest.raises(AssertionError):  # they did change something
        loaded.reference.check(prompt, told)


def uniforms(seed: int, count: int) -> Iterator[float]:
    """WebLLM's random numbers: Lehmer's generator with the multiplier 48271."""
    state = seed
    for _ in range(count):
        state = state * 48271 % (2**31 - 1)
        yield state / (2**31 - 1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.5, 0.9), (2.0, 1.0)])
def test_sampling(loaded: Loaded, temperature: float, top_p: float) -> None:
    """Each token is the one that the seed's number picks among the processor's probabilities."""
    seed = 987654321
    asked = {"temperature": temperature, "top_p": top_p, "logprobs": True, "top_logprobs": 2}
    told = loaded.ask(**asked, seed=seed)
    tokens = told["tokens"]
    rows = loaded.reference.rows(loaded.reference.prompt(TALK), tokens)[: len(tokens)]
    assert any(row.argmax() != token for row, token in zip(rows, tokens, strict=True))
    steps = zip(rows, tokens, uniforms(seed, len(tokens)), told["logprobs"], strict=True)
    error = 1e-3  # of a probability, of a logarithm
    for row, token, u, logprob in steps:
        probs = np.exp((row - row.max()) / temperature)
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        sums = np.cumsum(probs[order])
        nucleus = sums[np.searchsorted(sums, min(top_p, sums[-1]))]
        upper = sums[np.flatnonzero(order == token)[0]]
        assert upper - probs[token] <= top_p + error
        assert upper - probs[token] - error <= u * nucleus <= upper + error
        assert abs(logprob["logprob"] - np.log(probs[token])) <= error
    if top_p < 1:
        again, other = (loaded.ask(**asked, seed=s, max_tokens=4) for s in (seed, 1))
        assert again["tokens"] == tokens[:4] != other["tokens"]


def test_json_of_a_schema(loaded: Loaded) -> None:
    """The grammar lets nothing else through; a ban of white space, which it would, comes on top."""
    schema = {
        "type": "object",
        "properties": {"boat": {"enum": ["red", "blue"]}},
        "required": ["boat"],
    }
    decode = loaded.reference.llm.tokenizer.decode
    spaces = {str(i): -100 for i in range(1024) if any(map(str.isspace, decode([i])))}
    told = loaded.ask(
        response_format={"type": "json_object", "schema": json.dumps(schema)},
        logit_bias=spaces,
        max_tokens=30,
    )
    assert json.loads(told["text"]) in ({"boat": "red"}, {"boat": "blue"})
    assert told["finish"] == "stop"


def test_a_grammar(loaded: Loaded) -> None:
    """One that is written out."""
    told = loaded.ask(response_format={"type": "grammar", "grammar": 'root ::= "no" [0-9] [a-c]'})
    assert re.fullmatch("no[0-9][a-c]", told["text"]) and told["finish"] == "stop"


def test_a_sliding_window(sliding: Loaded, loaded: Loaded) -> None:
    """A prompt beyond the window, prefilled in chunks: the processor's text."""
    from qcc.runtime import SamplingParams

    messages = [{"role": "user", "content": "Tell me a story about a boat and a fish. " * 2}]
    prompt = sliding.reference.prompt(messages)
    assert len(prompt) > WINDOW["sliding_window"]
    told = sliding.ask(messages, max_tokens=12)
    params = SamplingParams(temperature=0, max_tokens=12)
    expected, whole = (
        each.reference.llm.generate([prompt], params)[0].token_ids for each in (sliding, loaded)
    )
    assert expected != whole  # the window matters
    pairs = zip(told["tokens"], expected, told["logits"], strict=True)
    wrong = next(((i, a, b, row) for i, (a, b, row) in enumerate(pairs) if a != b), None)
    if wrong is not None:
        i, found, wanted, row = wrong
        assert row[found] - row[wanted] <= 2 * sliding.reference.tolerance, f"token {i}"


def test_logits(sliding: Loaded) -> None:
    """All that WebLLM hands to a processor of logits: of the prompt's end, and of each step."""
    told = sliding.ask(max_tokens=5)
    prompt = sliding.reference.prompt(TALK)
    rows = sliding.reference.rows(prompt, told["tokens"])[:-1]
    np.testing.assert_allclose(
        np.array(told["logits"]), rows, rtol=0, atol=sliding.reference.tolerance
    )


def test_nothing_is_told_on_the_console(loaded: Loaded, sliding: Loaded) -> None:
    """No function that is missing, no shader that is refused, no invalid command. (Last.)"""
    assert loaded.console == [] and sliding.console == []
