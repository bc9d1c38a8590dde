"""The first Vulkan adapter, or a skip that says what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import pytest
import tvm

from qcc.runtime.errors import QccError
from qcc.runtime.native.build import COMPILERS
from qcc.runtime.native.vulkan import load_vulkan


@pytest.fixture(scope="session")
def vulkan() -> Any:
    """TVM's device of adapter 0."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler (Debian's g++)")
    if importlib.util.find_spec("wgpu") is None:
        pytest.skip("PyPI's wgpu is not installed")
    try:
        load_vulkan()
    except QccError as err:
        if "no Vulkan adapter" not in str(err):
            raise
        pytest.skip("no Vulkan adapter (Debian's mesa-vulkan-drivers and libvulkan1)")
    return tvm.device("vulkan", 0)
