"""What a device refuses before anything is loaded there, and how its errors read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcc.runtime.engine.device import HOST, Device, open_device
from qcc.runtime.engine.metadata import TensorType
from qcc.runtime.errors import QccError

GPU = Device("vulkan", 7, largest=1 << 20, features=("shader-f16",), name="Some GPU")
OLD = Device("vulkan", 7, largest=1 << 20, name="Old GPU")


def artifact(needs: dict[str, Any]) -> Any:
    """An artifact of two libraries, of which the second needs no feature."""
    entries = {
        "vulkan": SimpleNamespace(file="lib/vulkan.so", requires=needs),
        "cpu": SimpleNamespace(file="lib/cpu.so", requires={}),
    }
    return SimpleNamespace(folder=Path("m"), manifest=SimpleNamespace(libraries=entries))


def test_a_feature_that_lacks() -> None:
    """The library, the feature, the device and the way out are named."""
    needs = artifact({"machine": "x86_64", "features": ["shader-f16"]})
    path = Path("m/lib/vulkan.so")
    GPU.check_library(needs, path)
    OLD.check_library(needs, Path("m/lib/cpu.so"))
    OLD.check_library(artifact({"features": []}), path)
    with pytest.raises(QccError, match=r"vulkan.so: needs shader-f16, which Old GPU lacks.*q4f32"):
        OLD.check_library(needs, path)


def test_a_tensor_that_is_too_large() -> None:
    """It is named, with its size and the limit; the host takes any."""
    fits = TensorType("norm", (1 << 18,), "float32")
    large = TensorType("lm_head.q_weight", ((1 << 18) + 1,), "float32")
    GPU.check_tensors([fits])
    HOST.check_tensors([fits, large])
    with pytest.raises(QccError, match=r"lm_head.q_weight has 1 MB, and a buffer of Some GPU"):
        GPU.check_tensors([fits, large])


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_errors_are_one_line(kind: type[Exception]) -> None:
    """Of a GPU; the host's are mistakes of ours."""
    with pytest.raises(QccError) as caught, GPU.errors("decode"):
        raise kind("kernel x:\n\n  lost")
    assert str(caught.value) == "decode: kernel x:; lost"
    with pytest.raises(kind, match="kernel x"), HOST.errors("decode"):
        raise kind("kernel x")


def test_other_names_are_refused() -> None:
    """A browser's library names the way to run it."""
    with pytest.raises(QccError, match="qcc package web"):
        open_device("webgpu")
    with pytest.raises(QccError, match="must be cpu or vulkan"):
        open_device("vulcan")
