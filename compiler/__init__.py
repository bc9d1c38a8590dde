"""qcc.compiler: from a checkpoint to a library, in the order in which data passes.

cli/        one file a verb
options.py  CompileOptions, what a compile takes besides the model
driver.py   the steps, in order, on one page
source.py   MODEL on the command line -> a local checkpoint folder
config.py   config.json -> ModelConfig; recurrent_config.py: of layers with states; maxima.py
read_model.py  both for a folder; embedding.py: what sentence-transformers' files say of it
models/     one file an architecture, over shared blocks: ModelConfig -> Relax IRModule
passes/     one file a pass; pipeline.py is the list; row_kernel.py for functions written by hand
build.py    IRModule + target -> library
imports/    codes of other tools: GGUF, GPTQ, AutoAWQ; LoRA adapters
calibrate/  runs a model layer by layer, for methods that need text
codes.py    which codes are given, and which method makes the others
weights/    read, map, quantize, write shards
chat_config.py  mlc-chat-config.json and the tokenizer files; conv_template.py inside it
tokenizer_files.py  tokenizer.json, made of a tokenizer.model (sentencepiece_*.py) where needed
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcc.compiler.driver import compile_model, convert_model
    from qcc.compiler.options import CompileOptions

__all__ = ["CompileOptions", "compile_model", "convert_model"]


def __getattr__(name: str) -> Any:
    """Import the driver, and with it TVM, only when it is asked for: `qcc --help` stays fast."""
    if name in __all__:
        from qcc.compiler import driver, options

        return getattr(options if name == "CompileOptions" else driver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
