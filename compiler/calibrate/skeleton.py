"""Transformers' model of a config.json without numbers, and which tensor fills which parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcc.compiler.calibrate.libraries import torch, transformers
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError

WITHIN = "model.language_model."


class _Numberless(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
    """Within it torch.empty, by which parameters get their memory, allocates none.

    What is computed is real, such as the frequencies of a rotation: they stand in no checkpoint.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, on no device if it makes memory without numbers."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def without_numbers(folder: Path) -> Any:
    """The model, every parameter on torch's device meta, every buffer real.

    Raises:
        QccError: transformers refuses the config.
    """
    quiet = transformers.utils.logging
    verbosity = quiet.get_verbosity()
    quiet.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        with _Numberless():
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    # transformers raises whatever its config classes and modules meet.
    except Exception as err:
        reason = next(iter(str(err).strip().splitlines()), type(err).__name__)[:200]
        raise QccError(
            f"{folder / 'config.json'}: transformers cannot make this model: {reason}; compile "
            "with a method that needs no text"
        ) from err
    finally:
        quiet.set_verbosity(verbosity)
    with torch.device("meta"):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    nothing = torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
                    module._parameters[name] = nothing
    return model.eval().requires_grad_(False)


def decoder_layers(model: Any, folder: Path) -> tuple[str, Any]:
    """The name and the list of the decoder's layers.

    Raises:
        QccError: there is no list of num_hidden_layers modules, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise QccError(
            f"{folder}: {type(model).__name__} has {len(found)} lists of {count} layers, it must "
            "have one; such a model cannot run layer by layer"
        )
    return found[0]


def sources_of(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter -> tensor of the checkpoint.

    Names are the same, but that a tied head is the embedding, and that a head may have a name of
    its own in the file: it is then the one tensor of its shape that nothing else is made of. The
    tensors of a model that sees are within another name.

    Raises:
        QccError: a parameter has no tensor, or one of another shape; the model has experts, which
            transformers fuses.
    """
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    if any(".experts." in name and len(shape) == 3 for name, shape in shapes.items()):
        raise QccError(
            f"{checkpoint.folder}: mixtures of experts are not run layer by layer: give a text "
            "(--calib FILE), a checkpoint in safetensors that fits the memory, or --reference qcc"
        )
    head = _name_of(model, model.get_output_embeddings())
    others = [name for name in checkpoint.names if name not in shapes]
    found = {}
    for name, shape in shapes.items():
        source = name
        if name == head and model.config.get_text_config().tie_word_embeddings:
            source = _name_of(model, model.get_input_embeddings())
        elif name == head and name not in checkpoint:
            alike = [other for other in others if checkpoint.shape(other) == shape]
            source = alike[0] if len(alike) == 1 else name
        within = source.replace("model.", WITHIN, 1)
        if source not in checkpoint and within in checkpoint:
            source = within
        checkpoint.check(source, shape)
        found[name] = source
    return found


def _name_of(model: Any, module: Any) -> str:
    return next(f"{name}.weight" for name, m in model.named_modules() if m is module)
