"""LLM: an artifact folder that generates text.

llm = LLM("llama-q4")
print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qcc.runtime.artifact import Artifact
from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.library import Floats
from qcc.runtime.engine.model import CompiledModel
from qcc.runtime.engine.request import GenerationResult, Request, Session
from qcc.runtime.engine.sampling import SamplingParams
from qcc.runtime.engine.scheduler import Scheduler
from qcc.runtime.engine.tokenizer import Tokenizer
from qcc.runtime.errors import QccError

__all__ = ["LLM", "GenerationResult", "SamplingParams", "Session", "TextStream"]

Prompt = str | Sequence[int]
# Fields of SamplingParams that an artifact's configurations may set.
DEFAULTED = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class LLM:
    """A loaded model. Not for several threads at a time."""

    def __init__(
        self,
        artifact_dir: Path | str,
        device: str = "cpu",
        threads: int | None = None,
        context_window: int | None = None,
        max_batch_size: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        precision: str | None = None,
        kv: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Open the artifact and load its library for `device`.

        Args:
            artifact_dir: what `qcc compile` wrote.
            device: a target, or the name of one library, as cpu-x86-64-v3.
            threads: of the CPU; None: $TVM_NUM_THREADS, else the physical cores.
            context_window: tokens of prompt and answer; None: the library's.
            max_batch_size: sequences at once; None: the library's.
            progress: is told (what, bytes done, bytes in all) of long steps.
            precision: high (float32 activations) or low (int8); None: low.
            kv: how the KV cache keeps keys and values: f32, f16 or int8; None: f32 where the
                precision is high, else f16.
            weights: ram (read into memory of this process, in huge pages) or mmap (pages of the
                files, shared with other processes); None: ram.

        Raises:
            QccError: a damaged or unfit artifact, sizes beyond it, too little memory.
        """
        begun = time.perf_counter()

        def report(what: str) -> Callable[..., None] | None:
            return None if progress is None else lambda done, total, *_: progress(what, done, total)

        self.artifact = Artifact.open(artifact_dir)
        if self.artifact.manifest.task == "embedding":
            raise QccError(
                f"{artifact_dir}: an embedding model writes no text; use qcc embed, or Embedder"
            )
        with ThreadPoolExecutor(1) as pool:
            # Half a second where the vocabulary is large; most of it without Python's lock.
            tokenizer = pool.submit(Tokenizer, self.artifact.folder, self.artifact.chat_config)
            self.threads = tvm_runtime.set_threads(threads)
            self.artifact.verify(report("check"))
            self.model = CompiledModel(
                self.artifact,
                device,
                context_window,
                max_batch_size,
                report("load weights"),
                precision,
                kv,
                weights,
            )
            self.tokenizer = tokenizer.result()
        self.limits = self.model.limits
        self.scheduler = Scheduler(self.model)
        self.load_seconds = time.perf_counter() - begun

    def default_params(self, **changes: Any) -> SamplingParams:
        """Sampling as the artifact's configurations say, with `changes` that are not None."""
        found = sampling_defaults(self.artifact.chat_config, self.tokenizer.generation_config)
        found |= {name: value for name, value in changes.items() if value is not None}
        return SamplingParams(**found)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationResult]:
        """Answer all prompts, as many at a time as the library's batch allows.

        Args:
            prompts: a text, texts, or lists of token ids.
            params: for all, or one for each; None: `default_params()`.

        Raises:
            QccError: a prompt that does not fit, or params of another number.
        """
        many: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if many and isinstance(many[0], int):
            raise QccError("generate: give a list of prompts, as [[1, 2, 3]], not bare token ids")
        each = (
            [params] * len(many) if params is None or isinstance(params, SamplingParams) else params
        )
        if len(each) != len(many):
            raise QccError(f"generate: {len(each)} params for {len(many)} prompts")
        requests = [self._request(p, q) for p, q in zip(many, each, strict=True)]
        for request in requests:
            self.scheduler.submit(request)
        try:
            while any(request.finish_reason is None for request in requests):
                self.scheduler.step()
        finally:
            for request in requests:
                self.scheduler.cancel(request)
        return [request.result() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, session: Session | None = None
    ) -> TextStream:
        """Answer one prompt, text as it comes; `.result` of the stream has the rest.

        With a session the prompt's tokens that the KV cache still holds are not computed again.
        """
        request = self._request(prompt, params, session)
        self.scheduler.submit(request)
        return TextStream(self.scheduler, request)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """f32[n, V]: row i are the logits after token i of int[n].

        Raises:
            QccError: no tokens, more than the context, or unknown ones.
        """
        return self.scheduler.logits(token_ids)

    def reset(self) -> None:
        """Cancel what runs and forget everything that the KV cache holds."""
        self.scheduler.clear()

    def _request(
        self, prompt: Prompt, params: SamplingParams | None, session: Session | None = None
    ) -> Request:
        params = params or self.default_params()
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.scheduler.check_prompt(ids)
        # A special token has no text in which a stop string could be found.
        stops = {self.tokenizer.special_ids.get(text) for text in params.stop}
        stops |= set(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= self.tokenizer.eos_ids
        return Request(
            ids,
            params,
            self.scheduler.room(len(ids), params.max_tokens),
            {token for token in stops if token is not None},
            self.tokenizer.backend,
            self.limits.vocab_size,
            session,
        )


def sampling_defaults(chat: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams that the configurations set.

    mlc-chat-config.json comes first, generation_config.json gives what that lacks; there,
    `do_sample: false` means greedy.
    """
    found = {name: chat.get(name, generation.get(name)) for name in DEFAULTED}
    if generation.get("do_sample") is False and "temperature" not in chat:
        found["temperature"] = 0.0
    return {name: value for name, value in found.items() if value is not None}


class TextStream:
    """The pieces of one answer's text, to be read once; leaving early cancels the request."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        """Use `LLM.stream`."""
        self._scheduler = scheduler
        self._request = request

    def __iter__(self) -> Iterator[str]:
        """Text, as soon as it is certain; the pieces joined are `result.text`."""
        try:
            while True:
                while self._request.pieces:
                    yield self._request.pieces.popleft()
                if self._request.finish_reason is not None:
                    return
                self._scheduler.step()
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        self._scheduler.cancel(self._request)

    @property
    def result(self) -> GenerationResult:
        """The answer so far."""
        return self._request.result()
