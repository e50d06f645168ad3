"""A CUDA driver that launches nothing: Triton compiles, loads and launches kernels without a GPU.

It takes the place of ``libcuda.so.1`` in what Triton builds to launch kernels: every call of the driver's
succeeds at once, and the kernel's is counted. Tensors are the CPU's, and hold whatever they held before. What
a launch costs the host is what it costs on a GPU but for the driver's own part, a few microseconds, which is
the same whoever launches.

Needs a C compiler. Triton must not have been interpreted, and no kernel must have been launched before.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["StandIn", "install"]

# What Triton's launchers and its driver.c call. Attributes are those of a Hopper GPU as far as Triton asks.
_SOURCE = r"""
#include <stdint.h>
#include <string.h>

typedef int CUresult;
typedef struct {
  unsigned gridX, gridY, gridZ, blockX, blockY, blockZ, shared;
  void *stream, *attributes;
  unsigned count;
} Config;
typedef struct {
  unsigned grid[3], threads, shared;
  void *stream, *function;
  uint64_t parameters[64];
} Launch;

uint64_t stand_in_launches = 0;
unsigned stand_in_parameters = 0; /* how many parameters are copied from each launch */
Launch stand_in_last;

CUresult cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  stand_in_launches++;
  if (stand_in_parameters) {
    Launch last = {{config->gridX, config->gridY, config->gridZ},
                   config->blockX * config->blockY * config->blockZ, config->shared,
                   config->stream, function};
    for (unsigned i = 0; i < stand_in_parameters; i++) memcpy(&last.parameters[i], parameters[i], 8);
    stand_in_last = last;
  }
  return 0;
}
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error"; return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;             /* threads of a warp */
    case 16: *value = 132; break;            /* multiprocessors */
    case 75: *value = 9; break;              /* compute capability */
    case 76: *value = 0; break;
    case 12: case 82: *value = 65536; break; /* registers */
    default: *value = 232448;                /* shared memory */
  }
  return 0;
}
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block; registers, spills */
  return 0;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  static uintptr_t functions = 16;
  *function = (void *)functions++;
  return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
  *count = 1;
  return 0;
}
CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return 0;
}
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
CUresult cuTensorMapEncodeTiled(void) { return 0; }
CUresult cuTensorMapEncodeIm2col(void) { return 0; }
"""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * 64),
    )


class StandIn:
    """The driver that was installed.

    Attributes
    ----------
    device, stream
        What is current.
    """

    device, stream = 0, 7

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def launches(self) -> int:
        """How many kernels were launched so far."""
        return ctypes.c_uint64.in_dll(self._library, "stand_in_launches").value

    def watch(self, parameters: int) -> None:
        """Copy the first ``parameters``, 8 bytes each, of every launch from now on; 0 ends that."""
        ctypes.c_uint.in_dll(self._library, "stand_in_parameters").value = parameters

    def last(self) -> dict[str, Any]:
        """Return grid, threads, shared memory, stream, function and parameters of the last watched launch."""
        launch = _Launch.in_dll(self._library, "stand_in_last")
        return {
            name: list(value) if isinstance(value := getattr(launch, name), ctypes.Array) else value
            for name, _ in _Launch._fields_
        }


def install(folder: Path) -> StandIn:
    """Have Triton compile for Hopper and launch on nothing, in this process and from now on.

    The library is built in ``folder``, which must stay until Triton has launched a kernel.
    """
    source, path = folder / "stand_in.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    name = f"-Wl,-soname,{path.name}"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-w", name, "-o", path, source], check=True)
    # What Triton builds finds it by its name, as it is loaded already; the linker by this variable.
    stand_in = StandIn(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    from triton.backends.compiler import GPUTarget  # reads the variable when it is imported
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: stand_in.device
            self.get_current_stream = lambda device: stand_in.stream
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    return stand_in
