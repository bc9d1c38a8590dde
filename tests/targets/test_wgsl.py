"""The test bed of WGSL kernels: what it computes, what it refuses, what it reads of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from tvm.s_tir import dlight
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .launches import TARGET
from .wgsl import ADAPTERS, Compiled, WgslError, garbage, run_wgsl, validate_f16, wgsl_of

both = pytest.mark.parametrize("adapter", ADAPTERS)


def handmade(body: Callable[..., None], *args: tuple[str, tuple[Any, ...], str]) -> tirx.PrimFunc:
    """A function of which the last argument is written, as the Relax pipeline takes it."""
    attrs = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_attr(attrs)
            buffers = [
                T.arg(name, T.buffer(shape, dtype, layout=None)) for name, shape, dtype in args
            ]
            with T.sblock("root"):
                body(*buffers)
    return builder.get()


def row_sums(dtype: str, width: int) -> tirx.PrimFunc:
    """dtype[n, width] -> f32[n]: 64 threads a row, a tree in workgroup memory."""
    n, threads = tirx.Var("n", "int64"), 64

    def body(x: Any, out: Any) -> None:
        with T.thread_binding(n, thread="blockIdx.x") as row:
            with T.thread_binding(threads, thread="threadIdx.x") as lane:
                with T.sblock("row_sums"):
                    T.reads(x[row, 0:width])
                    T.writes(out[row])
                    sums = T.alloc_buffer((threads,), "float32", scope="shared", layout=None)
                    T.buffer_store(sums, T.float32(0), [lane])
                    with T.serial(0, -(-width // threads)) as i:
                        with T.If(i * threads + lane < width):
                            with T.Then():
                                value = T.cast(x[row, i * threads + lane], "float32")
                                T.buffer_store(sums, sums[lane] + value, [lane])
                    T.evaluate(T.tvm_storage_sync("shared"))
                    for step in (32, 16, 8, 4, 2, 1):
                        with T.If(lane < step):
                            with T.Then():
                                T.buffer_store(sums, sums[lane] + sums[lane + step], [lane])
                        T.evaluate(T.tvm_storage_sync("shared"))
                    with T.If(lane == 0):
                        with T.Then():
                            T.buffer_store(out, sums[0], [row])

    shape = (n, tirx.IntImm("int64", width))
    return handmade(body, ("x", shape, dtype), ("out", (n,), "float32"))


def centred_rows(*rules: Any) -> tirx.PrimFunc:
    """x f32[n, m] -> x less the sums of its rows, both extents symbolic, as `rules` schedule it."""
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    x = te.placeholder((n, m), "float32", name="x")
    k = te.reduce_axis((0, m), name="k")
    total = te.compute((n,), lambda i: te.sum(x[i, k], axis=k), name="total")
    func = te.create_prim_func([x, te.compute((n, m), lambda i, j: x[i, j] - total[i])])
    with TARGET:
        mod = dlight.ApplyDefaultSchedule(*rules)(tvm.IRModule({"main": func}))
    return mod["main"]


@both
@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (300, 7)])
@pytest.mark.parametrize("rule, kernels", [("Fallback", 2), ("GeneralReduction", 1)])
def test_generic_schedules(adapter: str, shape: tuple[int, int], rule: str, kernels: int) -> None:
    """Two kernels over memory that is no argument, or one with workgroup memory; odd extents."""
    func = centred_rows(getattr(dlight.gpu, rule)())
    found = wgsl_of(func)
    assert len(found) == kernels
    assert bool(found[0].workgroup_bytes) == (kernels == 1)
    # integers: sums are exact in any order
    x = np.random.default_rng(0).integers(-99, 99, shape).astype("float32")
    (out,) = run_wgsl(func, [x, garbage(shape, "float32")], adapter=adapter)
    np.testing.assert_array_equal(out, x - x.sum(1, keepdims=True))


@both
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 63), (7, 1001)])
def test_workgroup_memory_and_barriers(adapter: str, rows: int, width: int) -> None:
    """A kernel written by hand."""
    x = np.random.default_rng(0).integers(-99, 99, (rows, width)).astype("float32")
    args = [x, garbage((rows,), "float32")]
    (out,) = run_wgsl(row_sums("float32", width), args, adapter=adapter)
    np.testing.assert_array_equal(out, x.sum(1))


def test_half_precision() -> None:
    """On lavapipe; Dawn's null backend says whether the text is valid."""
    func = row_sums("float16", 129)
    x = np.random.default_rng(0).integers(-99, 99, (3, 129)).astype("float16")
    (out,) = run_wgsl(func, [x, garbage((3,), "float32")])
    np.testing.assert_array_equal(out, x.astype("float32").sum(1))
    (shader,) = wgsl_of(func)
    assert shader.needs_f16
    validate_f16(shader.source)


def test_what_a_shader_declares() -> None:
    """Threads, workgroup bytes, bindings and scalars, as counted by hand."""
    (shader,) = wgsl_of(row_sums("float32", 200))
    assert shader.threads == (64, 1, 1)
    assert shader.workgroup_bytes == 64 * 4
    storage = {each.name: (each.dtype, each.writable) for each in shader.storage}
    assert storage == {"x_ptr": ("f32", False), "out_ptr": ("f32", True)}
    assert [dtype for _, dtype in shader.scalars] == ["i32"]
    assert not shader.needs_f16


@both
def test_scalars_and_offsets(adapter: str) -> None:
    """Numbers among the arguments; an array that does not start where its storage does."""
    n = tirx.Var("n", "int64")
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            start = tirx.Var("start", "int64")
            x = T.arg(
                "x",
                T.buffer((n,), "int32", elem_offset=start, offset_factor=1, layout=None),
            )
            factor = T.arg("factor", tirx.Var("factor", "float32"))
            shift = T.arg("shift", tirx.Var("shift", "int32"))
            out = T.arg("out", T.buffer((n,), "float32", layout=None))
            with T.sblock("root"):
                with T.thread_binding(n, thread="blockIdx.x") as i:
                    with T.sblock("scaled"):
                        T.reads(x[i])
                        T.writes(out[i])
                        T.buffer_store(out, T.cast(x[i] + shift, "float32") * factor, [i])
    x, out = np.arange(9, dtype="int32"), garbage((9,), "float32")
    (out,) = run_wgsl(builder.get(), [x, 0.5, -7, out], adapter=adapter)
    np.testing.assert_array_equal(out, (x - 7) * np.float32(0.5))


@both
def test_what_is_not_written_stays_garbage(adapter: str) -> None:
    """No element is zero by accident; an argument that is read and written keeps its values."""

    def body(out: Any) -> None:
        with T.thread_binding(2, thread="blockIdx.x") as i:
            with T.sblock("some"):
                T.reads(out[i])
                T.writes(out[i])
                T.buffer_store(out, out[i] + 1, [i])

    func = handmade(body, ("out", (tirx.IntImm("int64", 4),), "float32"))
    before = garbage((4,), "float32")
    before[:2] = 5, 6
    (out,) = run_wgsl(func, [before], adapter=adapter)
    np.testing.assert_array_equal(out, [6, 7, np.nan, np.nan])
    assert before[0] == 5


def one_store(index: Any, value: Any = 1.0, threads: int = 1) -> tirx.PrimFunc:
    """out[index] = value, by one workgroup."""

    def body(out: Any) -> None:
        with T.thread_binding(threads, thread="threadIdx.x") as i:
            with T.sblock("store"):
                T.reads()
                T.writes(out[0:4])
                T.buffer_store(out, T.float32(value), [index(i)])

    return handmade(body, ("out", (tirx.IntImm("int64", 4),), "float32"))


@both
def test_a_store_beyond_the_end_is_an_error(adapter: str) -> None:
    """One element after the last: in a browser it would change another tensor."""
    with pytest.raises(WgslError, match="a store outside"):
        run_wgsl(one_store(lambda i: i + 4), [garbage((4,), "float32")], adapter=adapter)


@both
def test_a_broken_shader_is_an_error(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is in the message; the adapter serves the next kernel."""
    func = one_store(lambda i: i)
    broken = Compiled(func)
    (shader,) = broken.shaders.values()
    for old, new in (("fn main_kernel", "fnord main_kernel"), ("1.0", "1i * 1.0")):
        source = shader.source.replace(old, new)
        assert source != shader.source
        monkeypatch.setitem(
            broken.shaders, shader.name, type(shader)(**{**vars(shader), "source": source})
        )
        with pytest.raises(WgslError, match=f"(?s){adapter}: .*@workgroup_size"):
            broken([garbage((4,), "float32")], adapter=adapter)
    (out,) = run_wgsl(func, [garbage((4,), "float32")], adapter=adapter)
    assert out[0] == 1


def test_broken_half_precision_is_an_error() -> None:
    """The null backend compiles: it is not enough that the text parses."""
    (shader,) = wgsl_of(row_sums("float16", 129))
    for old, new in (("enable f16;", ""), ("f32(", "i32(")):
        with pytest.raises(WgslError, match=r"f16|i32"):
            validate_f16(shader.source.replace(old, new))


@both
def test_beyond_the_portable_limits(adapter: str) -> None:
    """Threads and workgroups; TVM itself refuses more than 32 KiB of workgroup memory."""
    out = garbage((4,), "float32")
    with pytest.raises(WgslError, match="512"):
        run_wgsl(one_store(lambda i: i % 4, threads=512), [out], adapter=adapter)

    def wide(out: Any) -> None:
        with T.thread_binding(70000, thread="blockIdx.x") as i:
            with T.sblock("wide"):
                T.reads()
                T.writes(out[0:4])
                T.buffer_store(out, T.float32(1), [i % 4])

    func = handmade(wide, ("out", (tirx.IntImm("int64", 4),), "float32"))
    with pytest.raises(WgslError, match="70000"):
        run_wgsl(func, [out], adapter=adapter)
