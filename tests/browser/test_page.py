"""The page as a user has it, on a stand-in for the model: by clicking and typing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytestmark = pytest.mark.browser

TESTS = Path(__file__).parents[1]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's own files, and the stand-in as qcc.js."""
    modules = TESTS / "web" / "node_modules"
    tvm = find_spec("tvm")
    if shutil.which("node") is None or not (modules / "esbuild").is_dir():
        pytest.skip("needs node, and npm install --ignore-scripts --prefix tests/web")
    assert tvm is not None and tvm.origin is not None
    out = tmp_path_factory.mktemp("page")
    script = TESTS.parent / "runtime" / "web" / "build.mjs"
    sources = Path(tvm.origin).parent / "web" / "src"
    subprocess.run(["node", script, modules, sources, out], check=True, timeout=60)
    shutil.copy(TESTS / "browser" / "stand_in.js", out / "qcc.js")
    record = {"model_id": "stand-in-q4f32_1", "qcc": {"files": [], "weight_bytes": 22e6}}
    (out / "model-record.json").write_text(json.dumps(record), encoding="utf-8")
    return out


@pytest.fixture
def visit(page: Any, folder: Path, serve: Callable[[Path], str]) -> Open:
    """visit(**options of the stand-in): the page, loaded until it shows `shows`."""
    url = serve(folder)

    def opened(shows: str = "#welcome", **options: Any) -> Any:
        page.goto(f"{url}?{urlencode(options)}")
        page.wait_for_selector(f"{shows}:not([hidden])")
        return page

    return opened


def message(page: Any) -> Any:
    """The field that one types in."""
    return page.get_by_label("Message", exact=True)


def ask(page: Any, text: str) -> None:
    """Type and send; wait until the answer is over."""
    message(page).fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#log[aria-busy=false]")


def messages(page: Any) -> list[str]:
    """What the conversation shows."""
    return list(page.locator(".message").all_inner_texts())


def test_a_conversation(visit: Open) -> None:
    """Answers stream in, the model is told all that was said, and the figures are shown."""
    page = visit()
    assert page.title() == "stand-in-q4f32_1"
    assert page.get_by_role("button", name="Send").is_disabled()
    ask(page, "Hello")
    ask(page, "And <b>now</b>?")
    answer = "You said “Hello”. " * 3
    assert messages(page)[:2] == ["Hello", answer.strip()]
    assert messages(page)[2] == "And <b>now</b>?"  # shown as it was typed
    calls = page.evaluate("window.calls")
    assert [m["role"] for m in calls[1]["messages"]] == ["user", "assistant", "user"]
    assert calls[1]["messages"][1]["content"] == answer.strip()
    assert calls[0]["options"] == {"temperature": 0.8, "top_p": 0.95}
    figures = page.locator("#figures").inner_text()
    assert figures == "12 tokens · 41.3 tok/s · first after 0.2 s · 35 MB of GPU memory"
    assert page.locator("#input").evaluate("e => e === document.activeElement")


def test_stop_keeps_what_was_said(visit: Open) -> None:
    """The button and Escape end an answer; what there is of it stays in the conversation."""
    page = visit(length=2000, each=10)
    for stop in ("click", "key"):
        message(page).fill("Go on")
        page.get_by_role("button", name="Send").click()
        page.wait_for_function(
            "document.querySelector('.message:last-child').innerText.length > 40"
        )
        if stop == "click":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        page.wait_for_selector("#log[aria-busy=false]")
        shown = messages(page)[-1]
        page.wait_for_timeout(100)
        assert messages(page)[-1] == shown and len(shown) < 5000
    calls = page.evaluate("window.calls")
    assert calls[1]["messages"][1]["content"].startswith("You said")


def test_a_new_conversation(visit: Open) -> None:
    """Nothing of the old one reaches the model, even where an answer was under way."""
    page = visit(length=2000, each=10)
    message(page).fill("Old")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.message').length == 2")
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_selector("#log[aria-busy=false]")
    assert messages(page) == [] and page.locator("#welcome").is_visible()
    message(page).fill("New")
    page.keyboard.press("Enter")
    page.wait_for_function("window.calls.length == 2")
    last = page.evaluate("window.calls[1].messages")
    assert last == [{"role": "user", "content": "New"}]


def test_settings(visit: Open) -> None:
    """They reach the model, are kept for the next visit, and go back to the model's own."""
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hello")
    sampling = {"temperature": 0, "top_p": 0.95, "max_tokens": 12, "seed": 7}
    call = page.evaluate("window.calls[0]")
    assert call["options"] == sampling
    assert call["messages"][0] == {"role": "system", "content": "Be brief."}

    page.reload()
    page.wait_for_selector("#welcome:not([hidden])")
    ask(page, "Hello")
    assert page.evaluate("window.calls[0].options") == sampling
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("3")
    page.get_by_role("button", name="Done").click()
    assert page.locator("#settings").is_visible()  # 3 is no probability
    page.get_by_role("button", name="Defaults").click()
    page.get_by_role("button", name="Done").click()
    ask(page, "Hello")
    assert page.evaluate("window.calls[1].options") == {"temperature": 0.8, "top_p": 0.95}


def test_an_answer_that_fails(visit: Open) -> None:
    """The reason is shown, and the question is not asked again with the next."""
    page = visit()
    ask(page, "fail here")
    alert = page.get_by_role("alert")
    assert alert.inner_text() == "The prompt has 900 tokens, the context window 512."
    ask(page, "Hello")
    assert len(page.evaluate("window.calls[1].messages")) == 1


def test_a_lost_gpu(visit: Open) -> None:
    """What was said can still be read, and the page says what happened."""
    page = visit()
    ask(page, "Hello")
    page.evaluate("window.lose()")
    figures = page.locator("#figures").inner_text()
    assert figures == "The GPU was lost (by the test); reload the page."
    assert message(page).is_disabled() and len(messages(page)) == 2


def test_a_load_that_fails(visit: Open) -> None:
    """Its reason, and another try."""
    page = visit(shows="#failure", fails="this browser has no WebGPU; use a current Chrome")
    text = page.locator("#failure-text").inner_text()
    assert text == "This browser has no WebGPU; use a current Chrome."
    assert message(page).is_disabled()
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#loading:not([hidden]), #failure:not([hidden])")


# All at one moment: the next part may come before the next question.
LOADING_AT_A_THIRD = """() => {
    const [note, text, bar] = ["note", "text", "bar"].map(
        (name) => document.querySelector(`#loading-${name}`));
    return note.innerText.includes("11 MB of") &&
        [note.innerText, text.innerText, bar.value / bar.max];
}"""


def test_progress(visit: Open) -> None:
    """Bytes while they come; weights from the browser's cache are called so."""
    page = visit(shows="#loading", pause=150, steps=6)
    shown = page.wait_for_function(LOADING_AT_A_THIRD).json_value()
    assert shown == ["11 MB of 33 MB", "Fetching the model", pytest.approx(1 / 3)]
    page = visit(shows="#loading", pause=150, steps=6, cached=1)
    page.wait_for_function("document.querySelector('#loading-note').innerText.includes('11 MB of')")
    assert page.locator("#loading-text").inner_text() == "Reading the model from this browser"


def test_a_large_download_is_asked_for(visit: Open, folder: Path) -> None:
    """Once: what this browser has loaded before it loads again."""
    path = folder / "model-record.json"
    small = path.read_text(encoding="utf-8")
    large = {"model_id": "stand-in-q4f32_1", "qcc": {"files": [], "weight_bytes": 695e6}}
    path.write_text(json.dumps(large), encoding="utf-8")
    try:
        page = visit(shows="#consent")
        assert "695 MB" in page.locator("#consent-text").inner_text()
        page.get_by_role("button", name="Load the model").click()
        page.wait_for_selector("#welcome:not([hidden])")
        visit()
    finally:
        path.write_text(small, encoding="utf-8")


def test_other_models(visit: Open) -> None:
    """Without a chat template texts are continued; an embedding model compares them."""
    page = visit(base=1)
    ask(page, "Once")
    assert messages(page) == ["Once", " and so on and on"]
    assert page.evaluate("window.calls") == [{"prompt": "Once"}]
    page = visit(slides=1)  # no context bounds its answers
    ask(page, "Hello")
    assert page.evaluate("window.calls[0].options.max_tokens") == 1024
    page = visit(task="embedding")
    for text in ("A small boat", "A small coat", "Z"):
        message(page).fill(text)
        page.keyboard.press("Enter")
        page.wait_for_function(f"document.querySelector('#log').innerText.includes('{text}')")
    page.wait_for_function("document.querySelectorAll('.message').length == 6")
    lines = messages(page)[-1].splitlines()
    assert len(lines) == 2 and all(line[:2] == "0." for line in lines)


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_scheme(visit: Open, width: int, scheme: str) -> None:
    """Nothing is cut off at the side, names are readable, all is reached by the keyboard."""
    page = visit(name="a-model-of-a-very-long-name-indeed-instruct-q4f16_1")
    page.set_viewport_size({"width": width, "height": 640})
    page.emulate_media(color_scheme=scheme)
    ask(page, "Averyveryverylongword" * 12)
    for _ in range(3):
        ask(page, "Hello there, how are you?")
    sizes = page.evaluate(
        "[...document.querySelectorAll('body, header, main, .message, #composer, button')]"
        ".filter(e => e.offsetParent !== null && e.getBoundingClientRect().width)"
        ".map(e => [e.id || e.className || e.tagName, e.getBoundingClientRect().right])"
    )
    assert all(right <= width for _, right in sizes), sizes
    end = page.evaluate(
        "(m => m.scrollHeight - m.scrollTop - m.clientHeight)(document.querySelector('main'))"
    )
    assert end < 60  # the view follows the text
    assert contrasts(page) == []
    message(page).fill("x")
    reached = []
    for _ in range(6):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"input", "send", "new", "open-settings", "log"} <= {*reached}


def contrasts(page: Any) -> list[Any]:
    """Texts whose contrast with their ground is less than 4.5 to 1 (WCAG 2 AA)."""
    found: list[Any] = page.evaluate(
        """() => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = (c) => {
            const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            return 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
          };
          const ground = (e) => {
            for (; e; e = e.parentElement) {
              const color = parse(getComputedStyle(e).backgroundColor);
              if (color.length < 4 || color[3] > 0) return color;
            }
          };
          return [...document.querySelectorAll("h1, button, .message, #figures, textarea")]
            .filter((e) => e.offsetParent && !e.disabled && e.id !== "settings")
            .map((e) => {
              const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
              return [e.id || e.className, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
            })
            .filter(([, ratio]) => ratio < 4.5);
        }"""
    )
    return found
