"""Buffers on Vulkan: copies of any size and offset, limits, memory that does not grow, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from qcc.runtime.native.vulkan import counters, load_vulkan

from .programs import affine, load

MANY = 1000


def part(tensor: Any, offset: int, size: int) -> Any:
    """`size` bytes of a tensor of bytes, from `offset` on, in the same memory."""
    return tensor._create_view((size,), "uint8", relative_byte_offset=offset)


def random_part(rng: np.random.Generator, size: int) -> tuple[int, int]:
    offset = int(rng.integers(0, size))
    return offset, int(rng.integers(1, size - offset + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4095, 70_001])
def test_odd_sizes_come_back(vulkan: Any, size: int) -> None:
    """WebGPU knows whole words only."""
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    np.testing.assert_array_equal(tvm.runtime.tensor(data, vulkan).numpy(), data)


def test_parts_at_any_offset(vulkan: Any) -> None:
    """Bytes beside a part stay as they are, whichever way it is written."""
    rng = np.random.default_rng(0)
    size = 61
    mirror = [rng.integers(0, 256, size, np.uint8) for _ in range(2)]
    tensors = [tvm.runtime.tensor(data, vulkan) for data in mirror]
    for _ in range(200):
        source, target = rng.integers(0, 2, 2)
        offset, count = random_part(rng, size)
        if rng.random() < 0.4:
            data = rng.integers(0, 256, count, np.uint8)
            part(tensors[target], offset, count).copyfrom(data)
            mirror[target][offset : offset + count] = data
        else:
            start = int(rng.integers(0, size - count + 1))
            part(tensors[source], start, count).copyto(part(tensors[target], offset, count))
            data = mirror[source][start : start + count].copy()
            mirror[target][offset : offset + count] = data
        start, count = random_part(rng, size)
        for tensor, data in zip(tensors, mirror, strict=True):
            found = part(tensor, start, count).numpy()
            np.testing.assert_array_equal(found, data[start : start + count])
    for tensor, data in zip(tensors, mirror, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), data)


def test_a_copy_of_many_pieces(vulkan: Any) -> None:
    """More than the staging memory holds, at an odd offset."""
    size = (40 << 20) + 3
    data = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    tensor = tvm.runtime.tensor(data, vulkan)
    np.testing.assert_array_equal(tensor.numpy(), data)
    again = np.ascontiguousarray(data[::-1][: size - 5])
    part(tensor, 1, size - 5).copyfrom(again)
    np.testing.assert_array_equal(part(tensor, 3, size - 7).numpy(), again[2:])


def test_a_buffer_beyond_the_limit_is_refused(vulkan: Any) -> None:
    """By name and with the limit, before anything is allocated."""
    adapter = load_vulkan()[0]
    with pytest.raises(ValueError, match=f"{adapter.max_buffer + 1} bytes.*{adapter.max_buffer}"):
        tvm.runtime.empty((adapter.max_buffer + 1,), "uint8", vulkan)
    tensor = tvm.runtime.empty((adapter.max_buffer,), "uint8", vulkan)
    assert tensor.shape == (adapter.max_buffer,)


def test_allocations_do_not_add_up(vulkan: Any, tmp_path: Path) -> None:
    """A thousand times, of sizes that are pooled and of one that is not."""
    kernel = load(affine(), tmp_path)["affine"]

    def once(step: int) -> None:
        small = tvm.runtime.tensor(np.ones(100 + step % 7, np.float32), vulkan)
        result = tvm.runtime.empty(small.shape, "float32", vulkan)
        kernel(small, result)
        if step % 100 == 0:
            large = tvm.runtime.tensor(np.full(1 << 20, step, np.float32), vulkan)
            there = tvm.runtime.empty(large.shape, "float32", vulkan)
            kernel(large, there)
            assert (there.numpy() == 2 * step + 1).all()

    for step in range(100):
        once(step)
    vulkan.sync()
    before = counters()
    for step in range(MANY):
        once(step)
    vulkan.sync()
    after = counters()
    for name in ("buffers", "bytes", "pooled_bytes", "bind_groups"):
        assert after[name] == before[name], name


def test_a_tensor_freed_before_its_kernel_ran(vulkan: Any, tmp_path: Path) -> None:
    """Too large for the pool: the memory lives as long as commands name it."""
    kernel = load(affine(), tmp_path)["affine"]
    size = 1 << 19
    result = tvm.runtime.empty((size,), "float32", vulkan)
    kernel(tvm.runtime.tensor(np.full(size, 3, np.float32), vulkan), result)
    other = tvm.runtime.tensor(np.full(size, 9, np.float32), vulkan)
    np.testing.assert_array_equal(result.numpy(), np.full(size, 7, np.float32))
    np.testing.assert_array_equal(other.numpy(), np.full(size, 9, np.float32))


def test_threads_share_a_device(vulkan: Any, tmp_path: Path) -> None:
    """Each sees its own numbers."""
    kernel = load(affine(), tmp_path)["affine"]

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            x = rng.standard_normal(int(rng.integers(1, 5000))).astype(np.float32)
            here = tvm.runtime.tensor(x, vulkan)
            there = tvm.runtime.empty(x.shape, "float32", vulkan)
            kernel(here, there)
            np.testing.assert_allclose(there.numpy(), x * 2 + 1, rtol=1e-6, atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_attributes(vulkan: Any) -> None:
    """What TVM asks of a device; another number is no device."""
    adapter = load_vulkan()[0]
    assert vulkan.exist
    assert vulkan.device_name == adapter.name
    assert vulkan.max_threads_per_block == adapter.max_threads >= 256
    assert vulkan.max_shared_memory_per_block >= 16 << 10
    beyond = tvm.device("vulkan", len(load_vulkan()))
    assert not beyond.exist
    with pytest.raises(ValueError, match="adapters"):
        tvm.runtime.empty((1,), "float32", beyond)
