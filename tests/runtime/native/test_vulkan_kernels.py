"""Kernels on Vulkan: their numbers, and what is refused by name instead of ending the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from qcc.runtime.native.vulkan import counters, kernel_times

from .programs import affine, build, load, target

# As many bytes in place of a call: a function that WGSL has not.
BROKEN = (b"= fma(", b"= fmz(")


def on(device: Any, array: np.ndarray) -> Any:
    return tvm.runtime.tensor(array, device)


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 70_001])
def test_a_kernel_of_any_length(vulkan: Any, tmp_path: Path, size: int) -> None:
    """The length is a scalar of the uniform block."""
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    y = on(vulkan, np.zeros_like(x))
    load(affine(), tmp_path)["affine"](on(vulkan, x), y)
    np.testing.assert_allclose(y.numpy(), x * 2 + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [65_535, 65_536, 65_537, 131_073])
def test_a_grid_beyond_the_limit_goes_on(vulkan: Any, tmp_path: Path, blocks: int) -> None:
    """A dimension has 65535 workgroups at most; nothing is written beyond the grid's end."""
    x = te.placeholder((blocks,), "float32", "x")
    index = te.compute(x.shape, lambda i: x[0] + i.astype("float32"), "index")
    kernel = load(build([x, index], "count", threads=1), tmp_path)["count"]
    found = on(vulkan, np.zeros(blocks + 8, np.float32))
    kernel(on(vulkan, np.ones(blocks, np.float32)), found._create_view((blocks,)))
    wanted = [*range(1, blocks + 1), *[0] * 8]
    np.testing.assert_array_equal(found.numpy(), np.array(wanted, np.float32))


def test_f16(vulkan: Any, tmp_path: Path) -> None:
    """The device has the feature, as lavapipe has it."""
    x = np.linspace(-4, 4, 257, dtype=np.float16)
    y = on(vulkan, np.zeros_like(x))
    load(affine("half", "float16"), tmp_path)["half"](on(vulkan, x), y)
    np.testing.assert_allclose(y.numpy(), x * np.float16(2) + np.float16(1), rtol=1e-3)


def test_dispatches_see_each_other(vulkan: Any, tmp_path: Path) -> None:
    """A thousand in a row, each on what the one before wrote: more than a submission holds."""
    x = te.placeholder((300,), "float32", "x")
    more = te.compute(x.shape, lambda i: x[i] + 1.0, "more")
    kernel = load(build([x, more], "more"), tmp_path)["more"]
    here, there = (on(vulkan, np.zeros(300, np.float32)) for _ in range(2))
    before = counters()
    for _ in range(500):
        kernel(here, there)
        kernel(there, here)
    np.testing.assert_array_equal(here.numpy(), np.full(300, 1000, np.float32))
    after = counters()
    assert after["dispatches"] - before["dispatches"] == 1000
    assert after["submits"] - before["submits"] < 10
    assert after["bind_groups"] - before["bind_groups"] == 2


def test_a_write_waits_for_the_kernels_before_it(vulkan: Any, tmp_path: Path) -> None:
    """The queue writes at once, dispatches wait for their submission."""
    kernel = load(affine(), tmp_path)["affine"]
    x, y = (on(vulkan, np.full(100, 3, np.float32)) for _ in range(2))
    for value in range(5):
        x.copyfrom(np.full(100, value, np.float32))
        kernel(x, y)
        x.copyfrom(np.full(100, -1, np.float32))
        np.testing.assert_array_equal(y.numpy(), np.full(100, 2 * value + 1, np.float32))


def test_times_of_kernels(vulkan: Any, tmp_path: Path) -> None:
    """Of each kernel by name, in more submissions than one; the numbers stay right."""
    double, half = (load(affine(name), tmp_path)[name] for name in ("double", "half"))
    x, y = (on(vulkan, np.ones(1000, np.float32)) for _ in range(2))
    double(x, y)
    with kernel_times() as times:
        for _ in range(300):
            double(x, y)
        before = times()
        half(y, x)
        after = times()
    assert {name: calls for name, (calls, _) in after.items()} == {
        "double_kernel": 300,
        "half_kernel": 1,
    }
    assert all(0 < seconds < 60 for _, seconds in after.values())
    assert before == {"double_kernel": after["double_kernel"]}
    half(x, y)
    np.testing.assert_array_equal(y.numpy(), np.full(1000, 15, np.float32))


def test_a_shader_that_does_not_compile_is_named(vulkan: Any, tmp_path: Path) -> None:
    """And the device goes on working."""
    broken = load(affine("broken"), tmp_path, BROKEN)["broken"]
    x, y = (on(vulkan, np.ones(8, np.float32)) for _ in range(2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"kernel broken_kernel: (.|\n)*fmz"):
            broken(x, y)
    load(affine(), tmp_path)["affine"](x, y)
    np.testing.assert_array_equal(y.numpy(), np.full(8, 3, np.float32))


def test_too_many_threads_are_refused(vulkan: Any, tmp_path: Path) -> None:
    """The adapter's limit is in the message."""
    most = vulkan.max_threads_per_block
    kernel = load(affine("wide", threads=2 * most), tmp_path)["wide"]
    x, y = (on(vulkan, np.ones(8, np.float32)) for _ in range(2))
    with pytest.raises(RuntimeError, match=rf"kernel wide_kernel: (.|\n)*{most}"):
        kernel(x, y)


def test_one_buffer_read_and_written_is_refused(vulkan: Any, tmp_path: Path) -> None:
    """A browser refuses it as well."""
    kernel = load(affine(), tmp_path)["affine"]
    x = on(vulkan, np.ones(8, np.float32))
    with pytest.raises(ValueError, match="kernel affine_kernel: buffers 0 and 1 are one"):
        kernel(x, x)
    np.testing.assert_array_equal(x.numpy(), np.ones(8, np.float32))


def test_a_scalar_beyond_32_bits_is_refused(vulkan: Any, tmp_path: Path) -> None:
    """WGSL has no wider ones."""
    x = te.placeholder((8,), "float32", "x")
    step = te.var("step", "int64")
    y = te.compute(x.shape, lambda i: x[i] + step.astype("float32"), "y")
    func = te.create_prim_func([x, step, y]).with_attr("global_symbol", "shift")
    schedule = tvm.s_tir.Schedule(func)
    (loop,) = schedule.get_loops(schedule.get_sblock("y"))
    schedule.bind(loop, "threadIdx.x")
    kernel = load(tvm.compile(schedule.mod, target=target()), tmp_path)["shift"]
    here, there = (on(vulkan, np.ones(8, np.float32)) for _ in range(2))
    kernel(here, 5, there)
    np.testing.assert_array_equal(there.numpy(), np.full(8, 6, np.float32))
    with pytest.raises(ValueError, match="4294967296 does not fit 32 bits"):
        kernel(here, 1 << 32, there)


def test_a_library_cut_short_is_refused(vulkan: Any) -> None:
    """The lengths in it are checked before they are believed."""
    load_bytes = tvm.get_global_func("ffi.Module.load_from_bytes.webgpu")
    for content in (b"", b"\x01", (1 << 62).to_bytes(8, "little"), bytes([2]) + bytes(15)):
        with pytest.raises(ValueError, match="cut short"):
            load_bytes(content)
