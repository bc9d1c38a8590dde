"""quantization_config of config.json -> Packing: how GPTQ and AutoAWQ packed the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qcc.compiler.config import IMPORTED_METHODS, shown
from qcc.quant_schemes.errors import did_you_mean
from qcc.runtime.errors import QccError

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
# How the numbers were found, or how other programs run them: not what the tensors hold. What
# bits, group and zero points they have is checked against their shapes.
_HARMLESS = frozenset(
    """
    batch_size block_name_to_quantize cache_block_outputs cache_examples_on_gpu damp_auto_increment
    damp_percent dataset do_fuse exllama_config fuse_max_seq_len hyb_act inside_layer_modules
    lm_head static_groups max_input_length mse meta model_file_base_name model_name_or_path
    model_seqlen
    modules_in_block_to_quantize modules_to_convert modules_to_fuse modules_to_not_convert
    pad_token_id quantizer sym tokenizer true_sequential use_cuda_fp16 use_exllama
    disable_exllama desc_act zero_point backend quant_method
    """.split()
)
_READ = {"bits", "w_bit", "group_size", "q_group_size", "checkpoint_format", "version"}
_REFUSED: dict[str, tuple[object, ...]] = {
    "dynamic": ({},),
    "is_marlin_format": (False,),
    "pack_dtype": ("int32",),
}
_REFUSED |= {"adapter": ({},), "rotation": (), "format": ("gptq", "gptq_v2", "gemm")}


@dataclass(frozen=True)
class Packing:
    """How `X.qweight` is to be read.

    `group` columns share a scale, or all of a row. A stored zero point of GPTQ's first format is
    one less than the true one: `zero_offset`.
    """

    method: Literal["gptq", "awq"]
    bits: int
    group: int | Literal["row"]
    zero_offset: int

    @property
    def name(self) -> str:
        """Of a scheme of such weights: gptq-4bit-128g."""
        group = "row" if self.group == "row" else f"{self.group}g"
        return f"{self.method}-{self.bits}bit-{group}"


def read_packing(config: Mapping[str, Any], where: str) -> Packing:
    """Read a quantization_config.

    Raises:
        QccError: a method, a bit width, a format or a key that is not known.
    """
    where = f"{where}: quantization_config"
    method = config.get("quant_method")
    if method not in IMPORTED_METHODS:
        raise QccError(
            f"{where}: quant_method {shown(method)} is not supported; "
            f"supported: {', '.join(IMPORTED_METHODS)}"
        )
    for key, value in config.items():
        if key in _REFUSED:
            if value is not None and value not in _REFUSED[key]:
                raise QccError(f"{where}: {key} {shown(value)} is not supported")
        elif key not in _HARMLESS and key not in _READ and value is not None:
            hint = did_you_mean(key, [*_READ, *_HARMLESS])
            raise QccError(f"{where}: unknown key {shown(key)} = {shown(value)}{hint}")
    bits = config.get("bits", config.get("w_bit"))
    if type(bits) is not int or bits not in BITS[method]:
        allowed = ", ".join(map(str, BITS[method]))
        raise QccError(f"{where}: bits is {shown(bits)}, {method} has {allowed}")
    group = config.get("group_size", config.get("q_group_size"))
    if type(group) is not int or not (group == -1 or 1 <= group <= 2**20):
        raise QccError(
            f"{where}: group_size is {shown(group)}, it must be a number of columns, or -1 for rows"
        )
    return Packing(method, bits, "row" if group == -1 else group, _zero_offset(config, where))


def _zero_offset(config: Mapping[str, Any], where: str) -> int:
    if config["quant_method"] == "awq":
        version = config.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise QccError(f"{where}: AWQ version {shown(version)} is not supported, only gemm is")
        return 0
    fmt = config.get("checkpoint_format", config.get("format")) or "gptq"
    if fmt not in ("gptq", "gptq_v2"):
        raise QccError(
            f"{where}: checkpoint_format {shown(fmt)} is not supported; supported: gptq, gptq_v2"
        )
    return 1 if fmt == "gptq" else 0
