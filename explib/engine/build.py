"""The compiled kernels: built at first use for this machine, and cached."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from explib.engine import native
from explib.engine.native import NoCompiler

__all__ = ["TYPES", "NoCompiler", "computes", "instructions", "library"]

SOURCES = Path(__file__).parent / "csrc"
_P, _I = ctypes.c_void_p, ctypes.c_int
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
"""What the engine may compute in, as the C++ numbers them."""


def library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The kernels as a C library, those of int8 or all others; compiled first, if needed.

    Raises NoCompiler, in one line, where it cannot be built; see `native.load`.
    """
    name = "int8.cpp" if dtype == torch.int8 else "kernels.cpp"
    return _library(name, os.environ.get("CXX"), os.environ.get("EXPLIB_CXXFLAGS"))


@cache  # for each setting of the environment
def _library(name: str, compiler: str | None, target: str | None) -> ctypes.CDLL:
    try:
        return _declared(native.load(SOURCES / name, "-pthread", "-fopenmp"))
    except NoCompiler:  # of those, not every one has OpenMP
        return _declared(native.load(SOURCES / name, "-pthread"))


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.explib_new.restype = _P
    lib.explib_new.argtypes = [_P, _I, _P, _I, _P, _I, _I, _I, _I]
    lib.explib_run.argtypes = [_P, ctypes.POINTER(_P), ctypes.POINTER(_P), ctypes.c_int64]
    lib.explib_free.argtypes = [_P]
    lib.explib_free.restype = None
    return lib


def computes(lib: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Whether the library computes in this one of TYPES."""
    return bool(lib.explib_computes(TYPES.index(dtype)))


def block(lib: ctypes.CDLL, dtype: torch.dtype) -> int:
    """Images of a block, whose pixels fill a vector."""
    return lib.explib_vector_bytes() // (2 if dtype == torch.float16 else 4)


def chunk(lib: ctypes.CDLL, vectors: int) -> int:
    """Of a 1x1 conv whose planes have so many vectors how many channels' kernels stand together."""
    return lib.explib_chunk(vectors)


def tap_chunk(lib: ctypes.CDLL, taps: int) -> int:
    """The same of any other conv of single images, by its taps; 0: its kernels go by channel."""
    return lib.explib_tap_chunk(taps)


def pair_chunk(lib: ctypes.CDLL, chunk: int) -> int:
    """Of a 1x1 conv how many channels of pairs, where it is so many of single ones."""
    return lib.explib_pair_chunk(chunk)


def largest(lib: ctypes.CDLL) -> int:
    """How many numbers a value of an image may have in fp32 for images to go in blocks."""
    return lib.explib_largest()


def at_once(lib: ctypes.CDLL) -> int:
    """Filters that are computed at once of a convolution with more."""
    return lib.explib_at_once()


def sums_near(lib: ctypes.CDLL) -> int:
    """Of a conv of single images by channel how many filters' sums the nearest cache holds."""
    return lib.explib_sums_near()


def byte_filters(lib: ctypes.CDLL) -> int:
    """Filters whose kernels stand together of an int8 conv 1x1 of which most words are kept."""
    return lib.explib_byte_filters()


def byte_chunk(
    lib: ctypes.CDLL, kernel: int, stride: int, height: int, width: int, channels: int,
    filters: int, flat: int,
) -> int:  # fmt: skip
    """Of such a conv how many channels' kernels stand together; filters: by `byte_filters`."""
    return lib.explib_byte_chunk(kernel, stride, height, width, channels, filters, flat)


def byte_point(lib: ctypes.CDLL) -> int:
    """How many channels a word of an int8 conv 1x1 holds: two, or four."""
    return lib.explib_byte_point()


def byte_tiny(lib: ctypes.CDLL, channels: int) -> int:
    """Of an int8 conv 3x3 of single planes of 2x2 how many kernels stand together, or 0."""
    return lib.explib_byte_tiny(channels)


def instructions(lib: ctypes.CDLL) -> str:
    """The library's vectors, for reports."""
    more = [str(t).removeprefix("torch.") for t in TYPES[1:] if computes(lib, t)]
    return f"{8 * lib.explib_vector_bytes()}-bit vectors" + "".join(f", {name}" for name in more)
