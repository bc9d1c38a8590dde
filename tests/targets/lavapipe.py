"""Dispatches on Mesa's software Vulkan through PyPI's wgpu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest

# The portable limits: what a kernel takes beyond them is refused here as on the smallest adapter.
LIMITS = {
    "max-storage-buffers-per-shader-stage": 10,
    "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-storage-size": 32 << 10,
    "max-storage-buffer-binding-size": 128 << 20,
}


@functools.cache
def _device() -> Any:
    wgpu = pytest.importorskip("wgpu", reason="PyPI's wgpu is not installed")
    from wgpu.backends.wgpu_native.extras import set_instance_extras

    set_instance_extras(backends=["Vulkan"])
    adapters = [
        adapter
        for adapter in wgpu.gpu.enumerate_adapters_sync()
        if adapter.info["backend_type"] == "Vulkan"
        and adapter.info["device"].startswith("llvmpipe")
    ]
    if not adapters:
        pytest.skip("no lavapipe (Debian's mesa-vulkan-drivers)")
    return adapters[0].request_device_sync(required_features=["shader-f16"], required_limits=LIMITS)


@functools.cache
def _pipeline(source: str, name: str, writable: tuple[bool, ...]) -> Any:
    """(the pipeline, its layout): storage buffers, then the uniform."""
    import wgpu

    device, visibility = _device(), wgpu.ShaderStage.COMPUTE
    types = ["storage" if each else "read-only-storage" for each in writable] + ["uniform"]
    layout = device.create_bind_group_layout(
        entries=[
            {"binding": index, "visibility": visibility, "buffer": {"type": each}}
            for index, each in enumerate(types)
        ]
    )
    pipeline = device.create_compute_pipeline(
        layout=device.create_pipeline_layout(bind_group_layouts=[layout]),
        compute={"module": device.create_shader_module(code=source), "entry_point": name},
    )
    return pipeline, layout


def run(data: Sequence[bytes], dispatches: Sequence[Any]) -> tuple[str, list[bytes]]:
    """Run dispatches over buffers of these contents: (an error or "", the contents afterwards)."""
    device = _device()
    import wgpu

    usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
    try:
        buffers = [device.create_buffer_with_data(data=each, usage=usage) for each in data]
        for each in dispatches:
            writable = tuple(binding.writable for binding in each.shader.storage)
            pipeline, layout = _pipeline(each.shader.source, each.shader.name, writable)
            uniform = device.create_buffer_with_data(
                data=each.uniform, usage=wgpu.BufferUsage.UNIFORM
            )
            bound = [*(buffers[number] for number in each.buffers), uniform]
            group = device.create_bind_group(
                layout=layout,
                entries=[
                    {"binding": index, "resource": {"buffer": buffer}}
                    for index, buffer in enumerate(bound)
                ],
            )
            encoder = device.create_command_encoder()
            compute = encoder.begin_compute_pass()
            compute.set_pipeline(pipeline)
            compute.set_bind_group(0, group)
            compute.dispatch_workgroups(*each.grid)
            compute.end()
            device.queue.submit([encoder.finish()])
        return "", [bytes(device.queue.read_buffer(buffer)) for buffer in buffers]
    except wgpu.GPUError as err:
        return str(err), []
