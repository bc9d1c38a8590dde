"""Embedding models and sliding windows in Chromium: the processor's numbers, without the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..embeddings import BERT, TEXTS, save_embedding
from .conftest import outside_tools

pytestmark = pytest.mark.browser

Run = Callable[[Any, str, Any], Any]


def packaged(model: Path, folder: Path, **sizes: int) -> Path:
    """A model for browsers and for the processor, in float32; its site is beside it."""
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.sizes import SizeFlags
    from qcc.targets.spec import BuildOptions, PackageOptions
    from qcc.targets.webgpu.package import package_site

    build = BuildOptions(precision="high")
    options = CompileOptions(
        quant="q4f32_1", targets=("cpu", "webgpu"), sizes=SizeFlags(**sizes), build=build
    )
    with outside_tools():
        compile_model(str(model), folder / "artifact", options)
        package_site(PackageOptions(folder / "artifact", folder / "site"))
    return folder / "site"


@pytest.fixture
def run(page: Any, serve: Callable[[Path], str]) -> Run:
    """run(site, code of a function (model, argument) -> result, argument): its result."""

    def evaluate(site: Path, code: str, argument: Any) -> Any:
        page.set_default_timeout(240_000)
        page.goto(serve(site) + "README.md")
        return page.evaluate(
            f"""async (argument) => {{
              const {{ load }} = await import("/qcc.js");
              return await ({code})(await load("/"), argument);
            }}""",
            argument,
        )

    return evaluate


def test_vectors_of_texts(run: Run, tmp_path: Path, tolerance: float) -> None:
    """As the processor's Embedder makes them, with the model's prompt and at another length."""
    from qcc.runtime import Embedder

    source = tmp_path / "bert"
    source.mkdir()
    save_embedding(source, "bert", BERT, prompts={"query": "find: "})
    site = packaged(source, tmp_path)
    reference = Embedder(tmp_path / "artifact", precision="high")
    plain, prompted, short = run(
        site,
        """async (model, texts) => [
          await model.embed(texts),
          await model.embed(texts, { promptName: "query" }),
          await model.embed(texts[0], { dimensions: 8 }),
        ].map((vectors) => vectors.map((vector) => [...vector]))""",
        TEXTS,
    )
    for found, wanted in (
        (plain, reference.embed(TEXTS)),
        (prompted, reference.embed(TEXTS, prompt_name="query")),
        (short, reference.embed(TEXTS[0], dimensions=8)),
    ):
        np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_sliding_window(run: Run, bundled: Path, tmp_path: Path, tolerance: float) -> None:
    """Far past the window; then another prompt, for which the sequence begins anew."""
    from qcc.runtime import LLM

    sizes = {"sliding_window": 32, "attention_sink": 4, "prefill_chunk": 16}
    site = packaged(bundled, tmp_path, **sizes)
    reference = LLM(tmp_path / "artifact", precision="high", kv="f32")
    prompt = reference.tokenizer.encode("Once there was a small red boat that saw the sea. " * 3)
    told, *answers = run(
        site,
        """async (model, prompt) => {
          const options = { temperature: 0, max_tokens: 50 };
          let told;
          try { model.generate(prompt); } catch (error) { told = error.message; }
          const first = await model.generate(prompt, options).complete();
          const second = await model.generate(prompt.slice(0, 20), options).complete();
          return [told, first, second];
        }""",
        prompt,
    )
    assert "give max_tokens" in told
    for size, answer in zip((len(prompt), 20), answers, strict=True):
        assert answer["cachedTokens"] == 0 and len(answer["tokenIds"]) == 50
        rows = reference.logits([*prompt[:size], *answer["tokenIds"]])[size - 1 :]
        for row, token in zip(rows, answer["tokenIds"], strict=False):
            assert row.max() - row[token] <= 2 * tolerance
