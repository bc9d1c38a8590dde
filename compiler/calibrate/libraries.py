"""torch and transformers: `from qcc.compiler.calibrate.libraries import torch, transformers`.

Raises:
    QccError: at import, where one of them is missing.
"""

from qcc.runtime.errors import QccError

try:
    import torch
    import transformers
except ImportError as err:
    raise QccError(
        f"running the checkpoint needs torch and transformers ({err.name} is missing): "
        "pip install 'qcc[calibrate]'"
    ) from err

__all__ = ["torch", "transformers"]
