"""qcc itself as one of the peers: `kind` is the path of an artifact."""

from __future__ import annotations

from qcc.runtime import LLM
from qcc.runtime.artifact import running_versions
from qcc.runtime.bench.cases import Case
from qcc.runtime.bench.measure import Contexts, run_case


class Peer:
    """A loaded artifact."""

    def __init__(self, checkpoint: str, kind: str, folder: str, threads: int) -> None:
        """Load it; the other arguments are those of all peers."""
        llm = LLM(kind, threads=threads, max_batch_size=1)
        scheme, kv = llm.artifact.manifest.scheme, llm.model.library.metadata.kv
        self.name = f"qcc {running_versions()['qcc']} {scheme}, KV cache {kv}"
        self._contexts = Contexts(llm.model)

    def run(self, case: str, tokens: int, depth: int) -> float:
        """See peer_serve."""
        return run_case(self._contexts, Case(case, tokens, depth))
