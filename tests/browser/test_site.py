"""qcc package web in a real Chromium, WebGPU in software: the bundled model, right numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from .conftest import outside_tools

pytestmark = pytest.mark.browser

MESSAGES = [{"role": "user", "content": "Tell me a story about a boat."}]
# qcc.js as the page imports it, which leaves the model and the device for the tests to see.
WRAPPED = """
import { load as original } from "./qcc.js?original";
export * from "./qcc.js?original";
export const load = async (...words) => (window.model = await original(...words));
"""
# The software GPU's compiler works on for a minute where a load has failed, and the next one waits.
NEVER_COMPILED = "GPUDevice.prototype.createComputePipelineAsync = () => new Promise(() => {});"
WATCHED = """
const original = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = async function (...words) {
  return (window.device = await original.apply(this, words));
};
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, bundled: Path) -> Path:
    """The bundled model for browsers and for the processor, in float32."""
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.targets.spec import BuildOptions

    options = CompileOptions(
        quant="q4f32_1", targets=("cpu", "webgpu"), build=BuildOptions(precision="high")
    )
    with outside_tools():
        return compile_model(str(bundled), tmp_path_factory.mktemp("artifact") / "tiny", options)


@pytest.fixture(scope="module")
def reference(artifact: Path) -> Any:
    """The same weights on the processor, computing in float32."""
    from qcc.runtime import LLM

    return LLM(artifact, precision="high", kv="f32")


@pytest.fixture(scope="module")
def site(artifact: Path, launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packaged."""
    from qcc.targets.spec import PackageOptions
    from qcc.targets.webgpu.package import package_site

    out = tmp_path_factory.mktemp("package") / "site"
    with outside_tools():
        package_site(PackageOptions(artifact, out, name="tiny"))
    return out


@pytest.fixture(scope="module")
def loaded(chromium: Any, site: Path) -> Iterator[SimpleNamespace]:
    """The page with the model loaded, its URL, and what it asked the server for."""
    from threading import Thread

    from qcc.compiler.cli._site_server import open_server

    server = open_server(site, 0, default=-1)
    thread = Thread(target=server.serve)
    thread.start()
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(180_000)
    page.add_init_script(WATCHED)
    wrapped = {"body": WRAPPED, "content_type": "text/javascript"}
    page.route("**/qcc.js", lambda route: route.fulfill(**wrapped))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#welcome:not([hidden]), #failure:not([hidden])")
    assert not page.locator("#failure").is_visible(), page.locator("#failure").inner_text()
    yield SimpleNamespace(page=page, url=server.url, asked=asked, context=context)
    context.close()
    server.close()
    thread.join()


def test_a_user_gets_a_story(loaded: Any, reference: Any, tolerance: float) -> None:
    """Temperature 0 by the settings; the text on the page is the processor's greedy text."""
    page = loaded.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("40")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Message", exact=True).fill(MESSAGES[0]["content"])
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("#log[aria-busy=false]")
    shown = page.locator(".message.assistant").inner_text()

    answer = page.evaluate(
        "async (m) => [model.render(m), (await model.chat(m, "
        "{temperature: 0, max_tokens: 40}).complete())]",
        MESSAGES,
    )
    prompt, result = reference.tokenizer.encode_rendered(answer[0]), answer[1]
    assert shown == result["text"]
    tokens = result["tokenIds"]
    rows = reference.logits([*prompt, *tokens])[len(prompt) - 1 :]
    for row, token in zip(rows, tokens, strict=False):
        assert row.max() - row[token] <= 2 * tolerance
    figures = page.locator("#figures").inner_text()
    assert "tok/s" in figures and "MB of GPU memory" in figures


def test_logits_of_every_position(loaded: Any, reference: Any, tolerance: float) -> None:
    """The same tokens on both, one by one there; and in one prefill, in chunks."""
    ids = reference.tokenizer.encode("Once upon a time there was a small red boat")
    found = loaded.page.evaluate(
        "async (ids) => (await model.logits(ids)).map((row) => [...row])", ids
    )
    np.testing.assert_allclose(np.array(found), reference.logits(ids), rtol=0, atol=tolerance)


def test_sampling_is_that_of_python(loaded: Any, reference: Any) -> None:
    """Penalties, top-p and a seed: each token is the one that Python's sampler takes."""
    from qcc.runtime.engine.sampling import Sampler, SamplingParams

    params = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 5}
    prompt = reference.tokenizer.encode("One day")
    tokens = loaded.page.evaluate(
        "async ([p, o]) => (await model.generate(p, o).complete()).tokenIds",
        [prompt, {**params, "max_tokens": 30}],
    )
    rows = reference.logits([*prompt, *tokens])[len(prompt) - 1 :]
    sampler = Sampler(SamplingParams(**params), prompt, rows.shape[1])
    assert tokens == [sampler(row) for row, _ in zip(rows, tokens, strict=False)]


def test_a_second_turn(loaded: Any, reference: Any) -> None:
    """What the cache holds is not computed again, and changes nothing."""
    found = loaded.page.evaluate(
        """async (first) => {
          const options = { temperature: 0, max_tokens: 12 };
          model.reset();
          const { text } = await model.chat(first, options).complete();
          const said = { role: "assistant", content: text };
          const second = [...first, said, { role: "user", content: "And then?" }];
          const kept = await model.chat(second, options).complete();
          model.reset();
          return [kept, await model.chat(second, options).complete()];
        }""",
        MESSAGES,
    )
    kept, fresh = found
    assert kept["cachedTokens"] > 10 and fresh["cachedTokens"] == 0
    assert kept["tokenIds"] == fresh["tokenIds"]


def test_what_a_model_refuses(loaded: Any) -> None:
    """Each in words, and the model answers on afterwards."""
    found = loaded.page.evaluate(
        """async () => {
          const told = async (work) => {
            try { await work(); } catch (error) { return `${error.name}: ${error.message}`; }
          };
          const stopper = new AbortController();
          const answer = model.generate("Once", { signal: stopper.signal, temperature: 0 });
          let busy;
          for await (const piece of answer) {
            busy = await told(() => model.generate("Twice").complete());
            stopper.abort();
          }
          return {
            busy,
            cancelled: answer.result.finishReason,
            twice: await told(async () => { for await (const _ of answer); }),
            long: await told(() => model.generate(Array(600).fill(5)).complete()),
            token: await told(() => model.generate([99999]).complete()),
            embed: await told(() => model.embed("x")),
            role: await told(() => model.chat([{ role: "nobody", content: "" }]).complete()),
            after: await model.generate("Once", { temperature: 0, max_tokens: 3 }).complete(),
          };
        }"""
    )
    assert found["busy"] == "QccError: an answer is under way; await it, or stop it first"
    assert found["cancelled"] == "cancelled"
    assert "an answer is read once" in found["twice"]
    assert "the prompt has 600 tokens, the context window 512" in found["long"]
    assert "token id 99999 in the prompt: the model has 0 to 1023" in found["token"]
    assert "embed needs an embedding model" in found["embed"]
    assert "the tiny model knows the roles" in found["role"]
    assert found["after"]["text"]


def test_a_second_visit_fetches_no_weights(loaded: Any) -> None:
    """They come from the browser's cache."""
    shards = [url for url in loaded.asked if url.endswith(".bin")]
    assert shards
    page = loaded.context.new_page()
    page.add_init_script(NEVER_COMPILED)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(loaded.url)
    page.wait_for_function(
        "document.querySelector('#loading-text').innerText == 'Preparing the GPU'"
    )
    assert any(url.endswith("tensor-cache.json") for url in asked)
    assert not [url for url in asked if url.endswith(".bin")]
    page.close()


def test_other_origins_may_load_it(loaded: Any, tmp_path: Path, serve: Any) -> None:
    """The library alone, from a page elsewhere, up to where the load is aborted."""
    (tmp_path / "index.html").write_text("<!doctype html><title>x</title>", encoding="utf-8")
    page = loaded.context.new_page()
    page.add_init_script(NEVER_COMPILED)
    page.goto(serve(tmp_path))
    told = page.evaluate(
        """async (url) => {
          const { load } = await import(url + "qcc.js");
          const stopper = new AbortController();
          const onProgress = ({ stage }) => stage == "shaders" && stopper.abort();
          try { await load(url, { onProgress, signal: stopper.signal }); }
          catch (error) { return error.name; }
        }""",
        loaded.url,
    )
    assert told == "AbortError"
    page.close()


def test_a_lost_gpu_is_told(loaded: Any) -> None:
    """Not by silence, nor by zeros: on the page, and by every later call. (Last: it ends it.)"""
    page = loaded.page
    page.evaluate("device.destroy()")
    page.wait_for_function("document.querySelector('#figures').innerText.includes('lost')")
    told = page.evaluate("model.generate('Once').complete().catch((error) => error.message)")
    assert "the GPU was lost" in told and "reload the page" in told


def fulfil(answer: dict[str, Any], route: Any) -> None:
    """Answer a request so."""
    route.fulfill(**answer)


@pytest.fixture
def failure(page: Any, site: Path, serve: Callable[[Path], str]) -> Callable[..., str]:
    """failure(routes, script): what the page shows where files or the browser are so."""

    def visit(routes: dict[str, Any] | None = None, script: str = "") -> str:
        for pattern, answer in (routes or {}).items():
            page.route(pattern, functools.partial(fulfil, answer))
        page.add_init_script(script or NEVER_COMPILED)
        page.goto(serve(site))
        page.wait_for_selector("#failure:not([hidden])", timeout=60_000)
        return str(page.locator("#failure-text").inner_text())

    return visit


def shard_of(site: Path) -> bytes:
    """The first shard."""
    return next(site.glob("models/*/resolve/main/params_shard_0.bin")).read_bytes()


def test_files_that_are_not_right(failure: Callable[..., str], site: Path) -> None:
    """A truncated shard says how much came."""
    data = shard_of(site)
    text = failure({"**/params_shard_0.bin": {"body": data[:-1000]}})
    assert "params_shard_0.bin: is truncated" in text
    assert f"{len(data) - 1000} bytes came, {len(data)} are recorded" in text


def test_a_damaged_shard_is_found(failure: Callable[..., str], site: Path) -> None:
    """By its md5."""
    data = bytearray(shard_of(site))
    data[1000] ^= 1
    assert "is damaged: its md5 is" in failure({"**/params_shard_0.bin": {"body": bytes(data)}})


def test_a_missing_shard(failure: Callable[..., str]) -> None:
    """The status that the server gave."""
    text = failure({"**/params_shard_0.bin": {"status": 404, "body": "gone"}})
    assert "params_shard_0.bin: the server answers 404" in text


def test_a_page_instead_of_the_wasm(failure: Callable[..., str]) -> None:
    """As servers send it for every name that they do not know."""
    page = {"body": "<!doctype html><p>Not here", "content_type": "text/html"}
    text = failure({"**/*.wasm": page})
    assert "webgpu.wasm: is no WebAssembly (served as text/html" in text


def test_a_wasm_of_another_type(page: Any, site: Path, serve: Callable[[Path], str]) -> None:
    """What is one loads, whatever the server calls it."""
    body = next(site.glob("models/*/resolve/main/*.wasm")).read_bytes()
    answer = {"body": body, "content_type": "text/plain"}
    page.route("**/*.wasm", functools.partial(fulfil, answer))
    page.add_init_script(NEVER_COMPILED)
    page.goto(serve(site))
    page.wait_for_function(
        "document.querySelector('#loading-text').innerText == 'Preparing the GPU'"
    )


def test_a_damaged_wasm(failure: Callable[..., str]) -> None:
    """It begins right, and is not."""
    assert "The library does not start" in failure(
        {"**/*.wasm": {"body": b"\0asm\1\0\0\0\xff\xff"}}
    )


def test_a_record_that_is_no_json(failure: Callable[..., str]) -> None:
    """Its URL, and what came."""
    text = failure({"**/tensor-cache.json": {"body": "<p>", "content_type": "text/html"}})
    assert "tensor-cache.json: is no JSON (served as text/html)" in text


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined });",
            "This browser has no WebGPU; use a current Chrome, Edge, Firefox or Safari.",
        ),
        ("GPU.prototype.requestAdapter = async () => null;", "offers no GPU"),
        (
            "Object.defineProperty(GPUAdapter.prototype, 'limits', { get: () => "
            "({ maxBufferSize: 2e5, maxStorageBufferBindingSize: 1e5 }) });",
            "takes 0.1 MB, one buffer may have 0.1 MB (maxStorageBufferBindingSize)",
        ),
        (
            "const old = GPUDevice.prototype.createShaderModule;"
            "GPUDevice.prototype.createShaderModule = function (d) {"
            "return old.call(this, { ...d, code: d.code.replace('fn rms_norm', 'fn') }); };"
            "const compile = GPUDevice.prototype.createComputePipelineAsync;"
            "GPUDevice.prototype.createComputePipelineAsync = function (d) {"
            "return d.compute.entryPoint.startsWith('rms_norm') ? compile.call(this, d)"
            " : new Promise(() => {}); };",
            "A shader does not compile on this GPU",
        ),
    ],
    ids=["no WebGPU", "no adapter", "too large", "a shader"],
)
def test_gpus_that_are_not_fit(failure: Callable[..., str], script: str, told: str) -> None:
    """What is missing, in words."""
    assert told in failure(script=script)


def test_a_missing_feature(failure: Callable[..., str], site: Path) -> None:
    """SwiftShader has no float16."""
    record = json.loads((site / "model-record.json").read_text(encoding="utf-8"))
    record["required_features"] = ["shader-f16"]
    text = failure({"**/model-record.json": {"json": record}})
    assert "needs the GPU feature shader-f16" in text and "q4f32_1 does without it" in text
