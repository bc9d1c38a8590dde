"""torch and transformers: `from qcc.compiler.calibrate.libraries import torch, transformers`.

Raises:
    QccError: at import, where one of them is missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from qcc.runtime.errors import QccError

try:
    import torch
    import transformers
except ImportError as err:
    raise QccError(
        f"running the checkpoint needs torch and transformers ({err.name} is missing): "
        "pip install 'qcc[calibrate]'"
    ) from err

__all__ = ["suited_threads", "torch", "transformers"]

SMALL = 512  # hidden size up to which a layer's work is too little to share


@contextmanager
def suited_threads(width: int) -> Iterator[None]:
    """Within it torch uses one thread for a model of small hidden size.

    Its threads wait for one another after each operation: where cores are busy with other work
    that made sampling 20 times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if width <= SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
