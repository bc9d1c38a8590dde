"""qcc.targets.webgpu: WGSL kernels and a wasm module, for browsers.

build.py    the target, and the wasm from what TVM compiled
wasm/       the runtime that every wasm has in it, and the linking
package.py  a static site around an artifact; bundle.py and licences.py make its parts
"""

from __future__ import annotations

from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.target import gpu_target
from qcc.targets.webgpu.build import export, requires, resolve
from qcc.targets.webgpu.package import package_site
from qcc.targets.webgpu.wasm.link import lacks

TARGET = gpu_target(
    "webgpu",
    "WebGPU: a wasm module with WGSL kernels, for browsers",
    Limits(),
    library_extension="wasm",
    resolve=resolve,
    requires=requires,
    export=export,
    lacks=lacks,
    packages={"web": package_site},
)
