"""LowerAttention and the extent that it reads: Before/Expected, up to the packed parameters."""

from __future__ import annotations

import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcc.compiler.passes.hoist_repack import HoistRepack
from qcc.targets.cpu.passes.lower_attention import LowerAttention


@I.ir_module
class Before:
    """Two layers of 2 query heads and a kv head of 8 numbers; `embed` has no cache."""

    @R.function
    def create_tir_paged_kv_cache(size: R.Shape([4])):
        return R.prim_value(1)

    @R.function
    def create_tir_paged_kv_cache_f32(size: R.Shape([4])):
        return R.prim_value(2)

    @R.function
    def decode(
        qkv: R.Tensor((3, 4, 8), "float32"),
        cache: R.Any,
        packed: R.Tuple(R.Tensor((4,), "float32")),
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            first = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (cache, R.prim_value(0), R.prim_value(0.5), qkv),
                out_ty=R.Tensor((3, 2, 8), "float32"),
            )
            second = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (cache, R.prim_value(1), R.prim_value(0.5), qkv),
                out_ty=R.Tensor((3, 2, 8), "float32"),
            )
            y = R.add(first, second)
            R.output(y)
        return y

    @R.function
    def embed(x: R.Tensor((4,), "float32"), packed: R.Tuple(R.Tensor((4,), "float32"))):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.add(x, packed[0])
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def create_tir_paged_kv_cache(size: R.Shape([4])):
        return R.prim_value(2)

    @R.function
    def create_tir_paged_kv_cache_f32(size: R.Shape([4])):
        return R.prim_value(2)

    @R.function
    def decode(
        qkv: R.Tensor((3, 4, 8), "float32"),
        cache: R.Any,
        packed: R.Tuple(R.Tensor(("kv",), "uint8")),
    ):
        kv = T.int64()
        R.func_attr({"num_input": 2})
        with R.dataflow():
            all_first = R.reshape(qkv, (3, 32, 1))
            out_first = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (cache, R.prim_value(0), R.prim_value(0.5), all_first),
                out_ty=R.Tensor((3, kv, 1), "float32"),
            )
            first = R.memory.view(out_first, R.shape([3, 2, 8]), R.dtype("float32"), 0)
            all_second = R.reshape(qkv, (3, 32, 1))
            out_second = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (cache, R.prim_value(1), R.prim_value(0.5), all_second),
                out_ty=R.Tensor((3, kv, 1), "float32"),
            )
            second = R.memory.view(out_second, R.shape([3, 2, 8]), R.dtype("float32"), 0)
            y = R.add(first, second)
            R.output(y)
        return y


def test_attention_of_a_cache_with_a_choice() -> None:
    lowered = LowerAttention(("f32", "f16"))(Before)
    hoist = HoistRepack()
    found = hoist(lowered)
    assert hoist.extents == ["kv"]
    assert [(slot.sources, slot.shape) for slot in hoist.slots] == [((0,), (4,))]
    # Every function takes the same tuple: embed's weight, then the extent that decode reads.
    for name in ("decode", "embed"):
        weight, extent = found[name].params[-1].ty.fields
        assert [int(d) for d in weight.shape] == [4]
        assert isinstance(extent.shape[0], tvm.tirx.Var) and str(extent.dtype) == "uint8"
    for name in ("create_tir_paged_kv_cache", "create_tir_paged_kv_cache_f32"):
        tvm.ir.assert_structural_equal(found[name].body, Expected[name].body)
    tvm.ir.assert_structural_equal(found["decode"].body, Expected["decode"].body, True)


def test_a_cache_without_a_choice_stays() -> None:
    plain = tvm.IRModule({"decode": Before["decode"]})
    tvm.ir.assert_structural_equal(LowerAttention(("f32",))(plain), plain)
