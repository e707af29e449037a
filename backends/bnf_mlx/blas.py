"""MLX on Linux links the reference BLAS, some sixty times slower than OpenBLAS: start again with OpenBLAS in front.

`LD_PRELOAD` is read when a process starts, so the command replaces itself, once, before anything is loaded.
"""

import ctypes.util
import glob
import os
import platform
import sys

FOLDERS = ("/usr/lib/*-linux-gnu/openblas-pthread", "/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib")


def preload_openblas() -> None:
    """Replace this process by the same command with OpenBLAS preloaded, where that helps and can be done.
    `LD_PRELOAD` set by the user, even to nothing, is left alone."""
    if platform.system() != "Linux" or "LD_PRELOAD" in os.environ:
        return
    if (library := find_openblas()) is not None:
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def find_openblas() -> str | None:
    """Path or soname of an installed OpenBLAS."""
    for folder in FOLDERS:
        if found := sorted(glob.glob(f"{folder}/libopenblas.so.0")):
            return found[0]
    return ctypes.util.find_library("openblas")
