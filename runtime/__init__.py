"""qcc.runtime: what happens at inference. Imports no compiler and no torch.

In the order in which data passes:
  errors.py     QccError, the one-line error of a user's mistake
  machine.py    what this machine is, and what a library needs of it
  files.py      temporary names and renames, the cache folder, checksums
  artifact.py   the folder that a compile writes: the only contract between compiler and runtime
  manifest.py   its qcc.json            verified.py  which of its files were checked already
  engine/       load the library and the weights, schedule, run, sample, detokenize
  native/       TVM's device `vulkan`, in C++
  web/          qcc.js and its page, in TypeScript: the same in a browser
  template.py   a chat template, in a bounded sandbox
  chat.py       conversations: the history, the prompt that the template makes of it
  bench/        benchmarks and their RESULTS.md
"""

from typing import TYPE_CHECKING, Any

from qcc.runtime.errors import QccError

if TYPE_CHECKING:
    from qcc.runtime.engine.embedder import Embedder
    from qcc.runtime.engine.llm import LLM, SamplingParams

__all__ = ["LLM", "Embedder", "QccError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import the engine only when it is asked for: the compiler needs just errors and artifact."""
    if name in ("LLM", "SamplingParams"):
        from qcc.runtime.engine import llm

        return getattr(llm, name)
    if name == "Embedder":
        from qcc.runtime.engine.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
