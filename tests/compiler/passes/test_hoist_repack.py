"""HoistRepack: Before/Expected, the slot table, and what it must leave alone."""

from __future__ import annotations

import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcc.compiler.passes.hoist_repack import HoistRepack, Slot


@I.ir_module(s_tir=True)
class Before:
    """`one` uses w repacked and as it is, `two` repacked; nobody uses the second tensor."""

    @T.prim_func(private=True, s_tir=True)
    def turn(w: T.Buffer((4, 8), "float32"), out: T.Buffer((8, 4), "float32")):
        T.func_attr({"qcc.role": "repack"})
        for i, j in T.grid(8, 4):
            with T.sblock("turn"):
                a, b = T.axis.remap("SS", [i, j])
                out[a, b] = w[b, a]

    @R.function
    def one(
        x: R.Tensor((8,), "float32"),
        p: R.Tuple(
            R.Tensor((4, 8), "float32"), R.Tensor((9,), "float32"), R.Tensor((4,), "float32")
        ),
    ):
        R.func_attr({"num_input": 1})
        cls = Before
        with R.dataflow():
            w = p[0]
            packed = R.call_tir(cls.turn, (w,), out_ty=R.Tensor((8, 4), "float32"))
            bias = p[2]
            y = R.add(R.matmul(x, packed), R.add(bias, R.matmul(w, x)))
            R.output(y)
        return y

    @R.function
    def two(
        x: R.Tensor((8,), "float32"),
        p: R.Tuple(
            R.Tensor((4, 8), "float32"), R.Tensor((9,), "float32"), R.Tensor((4,), "float32")
        ),
    ):
        R.func_attr({"num_input": 1})
        cls = Before
        with R.dataflow():
            w = p[0]
            packed = R.call_tir(cls.turn, (w,), out_ty=R.Tensor((8, 4), "float32"))
            y = R.matmul(x, packed)
            R.output(y)
        return y


@I.ir_module(s_tir=True)
class Expected:
    @T.prim_func(private=True, s_tir=True)
    def turn(w: T.Buffer((4, 8), "float32"), out: T.Buffer((8, 4), "float32")):
        T.func_attr({"qcc.role": "repack"})
        for i, j in T.grid(8, 4):
            with T.sblock("turn"):
                a, b = T.axis.remap("SS", [i, j])
                out[a, b] = w[b, a]

    @R.function
    def one(
        x: R.Tensor((8,), "float32"),
        p: R.Tuple(
            R.Tensor((4, 8), "float32"), R.Tensor((8, 4), "float32"), R.Tensor((4,), "float32")
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            packed = p[1]
            bias = p[2]
            y = R.add(R.matmul(x, packed), R.add(bias, R.matmul(w, x)))
            R.output(y)
        return y

    @R.function
    def two(
        x: R.Tensor((8,), "float32"),
        p: R.Tuple(
            R.Tensor((4, 8), "float32"), R.Tensor((8, 4), "float32"), R.Tensor((4,), "float32")
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            packed = p[1]
            y = R.matmul(x, packed)
            R.output(y)
        return y

    @R.function
    def repack_0(stored: R.Tensor((4, 8), "float32")):
        cls = Expected
        with R.dataflow():
            out = R.call_tir(cls.turn, (stored,), out_ty=R.Tensor((8, 4), "float32"))
            R.output(out)
        return out


def test_repacking_leaves_the_functions() -> None:
    hoist = HoistRepack()
    found = hoist(Before)
    tvm.relax.analysis.well_formed(found)
    tvm.ir.assert_structural_equal(found, Expected)
    assert hoist.slots == [
        Slot((0,), None, (4, 8), "float32"),
        Slot((0,), "repack_0", (8, 4), "float32"),
        Slot((2,), None, (4,), "float32"),
    ]


def test_where_nothing_is_repacked_each_used_tensor_is_a_slot() -> None:
    """The tuple stays as stored, less what nobody uses; no function is added."""
    hoist = HoistRepack()
    again = hoist(Expected)
    assert [slot.repack for slot in hoist.slots] == [None, None, None]
    tvm.ir.assert_structural_equal(again["one"], Expected["one"])
    tvm.ir.assert_structural_equal(again["two"], Expected["two"])


def test_the_callers_module_is_not_changed() -> None:
    before = tvm.ir.save_json(Before)
    HoistRepack()(Before)
    assert tvm.ir.save_json(Before) == before
