"""Compiling the CUDA sources at run time, with NVIDIA's own Python packages (`cuda-bindings` comes with PyTorch).

A compiled module is kept on disk under a name made from everything that it depends on (sources, options, compiler
version), so it is never stale. It is written under a temporary name and renamed: processes that compile the same
module at the same time do the work twice and harm nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from milo.errors import MiloError

SOURCES = Path(__file__).parent / "cuda"
CACHE = Path.home() / ".cache" / "milo" / "kernels"


class KernelError(MiloError):
    """A kernel does not compile, load or launch; the message holds the compiler's or the driver's words."""


def available() -> tuple[bool, str]:
    """Whether kernels can be compiled and launched here, and if not, why."""
    if not torch.cuda.is_available():
        return False, "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return False, f"sm_{capability[0]}{capability[1]} is older than sm_80"
    try:
        _bindings()
    except ImportError as error:
        return False, f"the package cuda-bindings is missing ({error})"
    return True, "supported"


class Module:
    """One `.cu` file compiled with one set of macros, loaded on one device.

    Args:
        name: file name below `SOURCES`.
        macros: `-D` definitions.
        device: CUDA device index; its primary context is PyTorch's.
        own: whether it uses instructions of this very architecture (`sm_90a`: wgmma, setmaxnreg).

    Raises:
        KernelError: with the compiler's log, or the driver's error name.
    """

    def __init__(self, name: str, macros: Mapping[str, int], device: int, own: bool = False) -> None:
        self._driver, _ = _bindings()
        target = architecture(device, own)
        self.waits = int(re.sub(r"\D", "", target)) >= 90  # older code has no instruction to wait for the kernel ahead
        options = (f"--gpu-architecture={target}", *(f"-D{key}={value}" for key, value in macros.items()))
        binary = compile_cached(name, options)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes PyTorch's context current in this thread
            self._module = self._call("cuModuleLoadData", binary)

    def kernel(self, name: str, shared_bytes: int) -> Kernel:
        """The entry point `name`, allowed `shared_bytes` of dynamic shared memory."""
        function = self._call("cuModuleGetFunction", self._module, name.encode())
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, shared_bytes)
        return Kernel(self, function, shared_bytes)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._driver, name)(*arguments)
        if int(error) != 0:
            raise KernelError(f"{name}: {error}")
        return results[0] if results else None


class Kernel:
    """A launchable entry point that takes one structure by value."""

    def __init__(self, module: Module, function: Any, shared_bytes: int) -> None:
        self._module, self._function, self._shared_bytes = module, function, shared_bytes
        driver = module._driver
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        self._early = early

    def __call__(
        self, blocks: int, threads: int, params: ctypes.Structure, early: bool = False, shared_bytes: int | None = None
    ) -> None:
        """Launch on PyTorch's current stream.

        Args:
            blocks: grid size.
            threads: block size.
            params: the kernel's only parameter.
            early: whether it may start before the kernel ahead of it in the stream has finished (programmatic
                dependent launch, from sm_90 on); the kernel itself then waits where it must.
            shared_bytes: dynamic shared memory, where this launch needs less than was allowed.
        """
        config = self._module._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes if shared_bytes is None else shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if early and self._module.waits:
            config.attrs, config.numAttrs = [self._early], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._module._call("cuLaunchKernelEx", config, self._function, ctypes.addressof(pointers), 0)


def architecture(device: int, own: bool) -> str:
    """What is compiled for a device: `sm_90`, or `sm_90a` where a kernel uses what this architecture alone has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if own else ''}"


def compile_cached(name: str, options: tuple[str, ...]) -> bytes:
    """The cubin of a source file, from the cache or compiled now; PTX for a virtual architecture (`compute_80`)."""
    _, nvrtc = _bindings()
    sources = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cu*"))}
    content = repr((name, sources, options, nvrtc.nvrtcVersion())).encode()
    cached = CACHE / f"{Path(name).stem}-{hashlib.sha256(content).hexdigest()[:32]}.cubin"
    try:
        return cached.read_bytes()
    except OSError:
        binary = _compile(nvrtc, name, sources, options)
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=CACHE)
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        os.replace(temporary, cached)
    except OSError:
        pass  # a read-only home costs a compilation a process, nothing else
    return binary


def _compile(nvrtc: Any, name: str, sources: Mapping[str, bytes], options: tuple[str, ...]) -> bytes:
    headers = [key for key in sources if key.endswith(".cuh")]
    arguments = (sources[name], name.encode(), len(headers), [sources[h] for h in headers])
    error, program = nvrtc.nvrtcCreateProgram(*arguments, [h.encode() for h in headers])
    if int(error) != 0:
        raise KernelError(f"nvrtcCreateProgram: {error}")
    flags = [option.encode() for option in ("--std=c++17", *options)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(error) != 0:
        log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelError(f"{name} does not compile ({error}):\n{log.decode()}")
    kind = "PTX" if any("compute_" in option for option in options) else "CUBIN"
    binary = b" " * getattr(nvrtc, f"nvrtcGet{kind}Size")(program)[1]
    getattr(nvrtc, f"nvrtcGet{kind}")(program, binary)
    nvrtc.nvrtcDestroyProgram(program)
    return binary


@lru_cache(maxsize=1)
def _bindings() -> tuple[Any, Any]:
    from cuda.bindings import driver, nvrtc  # not at the top: machines without a GPU need not have it

    return driver, nvrtc
