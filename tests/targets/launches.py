"""What a GPU PrimFunc's host side does, interpreted: its allocations and its kernel launches.

TVM's own split into host and device code is taken between two passes of a normal build.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx

TARGET = tvm.target.Target(
    {"kind": "webgpu"},
    host={"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm", "mcpu": "mvp"},
)
DIMENSIONS = [f"{index}Idx.{axis}" for index in ("block", "thread") for axis in "xyz"]


def _divide(a: int | float, b: int | float) -> int | float:
    """As C divides: integers towards zero."""
    return a / b if isinstance(a, float) else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    tirx.Add: operator.add,
    tirx.Sub: operator.sub,
    tirx.Mul: operator.mul,
    tirx.FloorDiv: operator.floordiv,
    tirx.FloorMod: operator.mod,
    tirx.Div: _divide,
    tirx.Mod: lambda a, b: a - b * _divide(a, b),
    tirx.Min: min,
    tirx.Max: max,
    tirx.EQ: operator.eq,
    tirx.NE: operator.ne,
    tirx.LT: operator.lt,
    tirx.LE: operator.le,
    tirx.GT: operator.gt,
    tirx.GE: operator.ge,
    tirx.And: lambda a, b: a and b,
    tirx.Or: lambda a, b: a or b,
    tirx.LShift: operator.lshift,
    tirx.RShift: operator.rshift,
    tirx.BitwiseAnd: operator.and_,
    tirx.BitwiseOr: operator.or_,
    tirx.BitwiseXor: operator.xor,
}
ELEMENTS_BEFORE = 16  # of an argument whose elem_offset is a variable, times its offset_factor


@dataclass(frozen=True)
class Memory:
    """A GPU buffer in bytes: argument number `argument`, from byte `start` on, or scratch."""

    size: int
    argument: int | None = None
    start: int = 0


@dataclass(frozen=True)
class Launch:
    """A dispatch: the numbers of its buffers in `Run.memory`, scalars, workgroups, threads."""

    kernel: str
    buffers: tuple[int, ...]
    scalars: tuple[int | float, ...]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """All that one call of the PrimFunc does on the GPU."""

    memory: tuple[Memory, ...]
    launches: tuple[Launch, ...]


@tvm.instrument.pass_instrument
class _HostSide:
    """Keeps the module as SplitHostDevice leaves it."""

    def run_after_pass(self, mod: Any, info: Any) -> None:
        if info.name == "tirx.SplitHostDevice":
            self.mod = mod


def build(func: tirx.PrimFunc) -> tuple[Any, tirx.PrimFunc]:
    """Build for webgpu: (the runtime module, the host function with its launches)."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    host = _HostSide()
    with TARGET, tvm.transform.PassContext(instruments=[host]):
        module = tvm.tirx.build(mod, TARGET)
    return module, host.mod["main"]


def trace(host: tirx.PrimFunc, args: Sequence[Any]) -> Run:
    """The launches of a call with these arguments: numpy arrays and numbers, in order."""
    interpreter = _Interpreter()
    assert len(host.params) == len(args), f"{len(args)} arguments for {host.params}"
    for number, (param, arg) in enumerate(zip(host.params, args, strict=True)):
        interpreter.bind(param, arg, number)
    interpreter.check(host.params, args)
    interpreter.run(host.body)
    return Run(tuple(interpreter.memory), tuple(interpreter.launches))


class _Interpreter:
    def __init__(self) -> None:
        self.memory: list[Memory] = []
        self.launches: list[Launch] = []
        self.scalars: dict[Any, Any] = {}
        self.places: dict[Any, int] = {}  # a buffer -> its memory
        self.pointers: dict[Any, int] = {}  # a pointer to one as vectors -> its memory

    def bind(self, param: Any, arg: Any, number: int) -> None:
        if not isinstance(param.ty, tirx.BufferType):
            self.scalars[param] = arg
            return
        assert isinstance(arg, np.ndarray), f"{param} is a buffer, not {arg!r}"
        for extent, length in zip(param.shape, arg.shape, strict=True):
            if isinstance(extent, tirx.Var) and extent not in self.scalars:
                self.scalars[extent] = length
        start = 0
        if isinstance(param.elem_offset, tirx.Var):
            # in use it is where the array starts in its storage: never only 0
            start = ELEMENTS_BEFORE * max(int(param.offset_factor), 1)
            self.scalars[param.elem_offset] = start
        first = start * arg.itemsize
        self.places[param] = len(self.memory)
        self.memory.append(Memory(first + arg.nbytes, number, first))

    def check(self, params: Sequence[Any], args: Sequence[Any]) -> None:
        """Shapes and dtypes, as the host function itself asserts them."""
        for param, arg in zip(params, args, strict=True):
            if param in self.places:
                wanted = tuple(self.value(extent) for extent in param.shape)
                assert (wanted, str(param.dtype)) == (arg.shape, str(arg.dtype)), (
                    f"{param.name}: wants {param.dtype}{wanted}, got {arg.dtype}{arg.shape}"
                )

    def value(self, expr: Any) -> int | float:
        match expr:
            case tirx.Var() if expr in self.scalars:
                return self.scalars[expr]
            case tirx.IntImm() | tirx.FloatImm():
                return expr.value
            case tirx.Cast():
                return (float if "float" in str(expr.ty.dtype) else int)(self.value(expr.value))
            case tirx.Select():
                chosen = expr.true_value if self.value(expr.condition) else expr.false_value
                return self.value(chosen)
            case tirx.Not():
                return not self.value(expr.a)
            case tirx.BitwiseNot():
                return ~int(self.value(expr.a))
            case _ if type(expr) in BINARY:
                return BINARY[type(expr)](self.value(expr.a), self.value(expr.b))
        raise NotImplementedError(f"on the host side: {type(expr).__name__}: {expr}")

    def place(self, data: Any) -> int:
        """The memory that a `buffer.data`, or a pointer to it of another type, stands for."""
        if isinstance(data, tirx.Var):
            return self.pointers[data]
        assert data.op.name == "tirx.buffer_data", f"an argument that is no whole buffer: {data}"
        return self.places[data.args[0]]

    def run(self, stmt: Any) -> None:
        match stmt:
            case tirx.SeqStmt():
                for each in stmt.seq:
                    self.run(each)
            case tirx.AttrStmt():
                self.run(stmt.body)
            case tirx.AllocBuffer():
                count = math.prod(int(self.value(extent)) for extent in stmt.buffer.shape)
                self.places[stmt.buffer] = len(self.memory)
                itemsize = tvm.DataType(str(stmt.buffer.dtype)).itemsize
                self.memory.append(Memory(count * itemsize))
            case tirx.DeclBuffer():
                self.places[stmt.buffer] = self.place(stmt.data)
            case tirx.Bind() if isinstance(stmt.var.ty, tvm.ir.PointerType):
                assert stmt.value.op.name == "tirx.reinterpret", stmt
                self.pointers[stmt.var] = self.place(stmt.value.args[0])
            case tirx.Bind():
                self.scalars[stmt.var] = self.value(stmt.value)
            case tirx.IfThenElse():
                branch = stmt.then_case if self.value(stmt.condition) else stmt.else_case
                if branch is not None:
                    self.run(branch)
            case tirx.For():
                low, count = int(self.value(stmt.min)), int(self.value(stmt.extent))
                for step in range(low, low + count):
                    self.scalars[stmt.loop_var] = step
                    self.run(stmt.body)
            case tirx.Evaluate() if isinstance(stmt.value, tirx.IntImm):
                pass
            case tirx.Evaluate() if stmt.value.op.name == "tirx.call_ffi_kernel":
                self.launches.append(self.launch(stmt.value))
            case _:
                raise NotImplementedError(f"on the host side: {type(stmt).__name__}\n{stmt}")

    def launch(self, call: Any) -> Launch:
        name, *args = call.args
        tags = list(call.attrs.launch_params)
        sizes = {
            tag: int(self.value(arg)) for tag, arg in zip(tags, args[-len(tags) :], strict=True)
        }
        dimensions = tuple(sizes.get(tag, 1) for tag in DIMENSIONS)
        given = args[: -len(tags)]
        pointers = [arg for arg in given if _is_pointer(arg)]
        return Launch(
            name.value,
            tuple(self.place(arg) for arg in pointers),
            tuple(self.value(arg) for arg in given if not _is_pointer(arg)),
            dimensions[:3],
            dimensions[3:],
        )


def _is_pointer(expr: Any) -> bool:
    if isinstance(expr, tirx.Var):
        return isinstance(expr.ty, tvm.ir.PointerType)
    return isinstance(expr, tvm.ir.Call) and expr.op.name == "tirx.buffer_data"
