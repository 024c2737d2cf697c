"""The compiled kernels: built at first use for this machine, and cached."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import ninja
import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread")
_P = ctypes.c_void_p
_I = ctypes.c_int


class NoCompiler(RuntimeError):
    """There is no C++ compiler here, or it refused the kernels."""


def flags() -> tuple[str, ...]:
    """The compiler's flags; $EXPLIB_CXXFLAGS, where set, replaces `-march=native`."""
    chosen = os.environ.get("EXPLIB_CXXFLAGS")
    return FLAGS if chosen is None else (*(f for f in FLAGS if "march" not in f), *chosen.split())


def library() -> ctypes.CDLL:
    """The kernels as a C library, compiled first where that is not done (about 20 s).

    Raises NoCompiler, in one line, where that cannot be.
    """
    return _library(flags())


@cache
def _library(chosen: tuple[str, ...]) -> ctypes.CDLL:
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise NoCompiler(f"no C++ compiler {compiler!r} found; install g++ or set CXX")
    # Another source, compiler or processor is another build: a home may serve several machines
    what = subprocess.run(
        [compiler, *chosen, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True
    ).stdout
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(chosen).encode() + what).hexdigest()
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{path}"  # a virtual environment not activated
    try:
        built = cpp_extension.load(
            f"explib_{digest[:12]}",
            [str(SOURCE)],
            extra_cflags=list(chosen),
            extra_ldflags=["-pthread"],
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        why = (lines or [str(error)])[-1].strip()[:200]
        raise NoCompiler(f"{compiler} could not build {SOURCE.name}: {why}") from None
    finally:
        os.environ["PATH"] = path
    return declare(ctypes.CDLL(built))


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' types."""
    lib.explib_new.restype = _P
    lib.explib_new.argtypes = [_P, _I, _P, _I, _P, _I, _I, _I, _I]
    lib.explib_run.argtypes = [_P, ctypes.POINTER(_P), ctypes.POINTER(_P), ctypes.c_int64]
    lib.explib_free.argtypes = [_P]
    lib.explib_free.restype = None
    return lib


def instructions(lib: ctypes.CDLL) -> str:
    """The width of the library's vectors, for reports."""
    half = ", native fp16" if lib.explib_half() else ""
    return f"{8 * lib.explib_vector_bytes()}-bit vectors{half}"


def has_half(lib: ctypes.CDLL) -> bool:
    """Whether the library computes in fp16."""
    return bool(lib.explib_half())


__all__ = ["NoCompiler", "declare", "flags", "has_half", "instructions", "library"]
assert torch.__version__  # the library is linked with torch's
