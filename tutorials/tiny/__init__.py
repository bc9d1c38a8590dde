"""The bundled model: a small Llama that tells short stories, made from this folder alone.

In the order in which data passes: ``words`` (vocabulary), ``tale`` (people, scenes), ``plots_*``
and ``details`` (the grammar), ``chat`` (conversations), ``make_text`` (the training text),
``tokenizer``, ``train``, ``figures`` (perplexity, samples), ``model/`` and ``heldout.txt`` (the
result). Importing this package loads nothing.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
HELDOUT = Path(__file__).parent / "heldout.txt"

__all__ = ["HELDOUT", "MODEL_DIR"]
