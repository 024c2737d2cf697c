"""The compiled kernels: built at first use for this machine, and cached."""

import ctypes
import os
from functools import cache
from pathlib import Path

from explib import native
from explib.native import NoCompiler

__all__ = ["NoCompiler", "has_half", "instructions", "library"]

SOURCE = Path(__file__).with_name("kernels.cpp")
_P, _I = ctypes.c_void_p, ctypes.c_int


def library() -> ctypes.CDLL:
    """The kernels as a C library, compiled first where that is not done (some 10 s).

    Raises NoCompiler, in one line, where it cannot be built; see `native.load`.
    """
    return _library(os.environ.get("CXX"), os.environ.get("EXPLIB_CXXFLAGS"))


@cache  # for each setting of the environment
def _library(compiler: str | None, target: str | None) -> ctypes.CDLL:
    return _declared(native.load(SOURCE, "-pthread"))


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.explib_new.restype = _P
    lib.explib_new.argtypes = [_P, _I, _P, _I, _P, _I, _I, _I, _I]
    lib.explib_run.argtypes = [_P, ctypes.POINTER(_P), ctypes.POINTER(_P), ctypes.c_int64]
    lib.explib_free.argtypes = [_P]
    lib.explib_free.restype = None
    return lib


def has_half(lib: ctypes.CDLL) -> bool:
    """Whether the library computes in fp16."""
    return bool(lib.explib_half())


def instructions(lib: ctypes.CDLL) -> str:
    """The library's vectors, for reports."""
    half = " with fp16" if has_half(lib) else ""
    return f"{8 * lib.explib_vector_bytes()}-bit vectors{half}"
