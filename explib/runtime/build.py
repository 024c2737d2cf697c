"""The compiled kernels: built at first use for this machine, and cached."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import ninja
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++20", "-O3", "-pthread")
TARGETS = ("-march=native", "-mcpu=native")  # the first that the compiler takes
_P, _I = ctypes.c_void_p, ctypes.c_int


class NoCompiler(RuntimeError):
    """There is no C++ compiler here, or it refused the kernels."""


def library() -> ctypes.CDLL:
    """The kernels as a C library, compiled first where that is not done (some 10 s).

    $CXX names the compiler; $EXPLIB_CXXFLAGS, where set, stands for `-march=native`. Raises
    NoCompiler, in one line, where it cannot be built.
    """
    return _library(cpp_extension.get_cxx_compiler(), os.environ.get("EXPLIB_CXXFLAGS"))


@cache
def _library(compiler: str, target: str | None) -> ctypes.CDLL:
    command = shlex.split(compiler)
    if shutil.which(command[0]) is None:
        raise NoCompiler(f"no C++ compiler {command[0]!r} here; install g++ or set CXX")
    # a processor is known by the macros its flags define: one home may serve several machines
    for chosen in [target] if target is not None else TARGETS:
        flags = [*FLAGS, *shlex.split(chosen)]
        macros = subprocess.run(
            [*command, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True
        )
        if macros.returncode == 0:
            break
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    what = (
        b"".join(path.read_bytes() for path in sources)
        + " ".join([compiler, *flags]).encode()
        + macros.stdout
    )
    path = os.environ["PATH"]
    # ninja lies beside Python, which may not be on the path
    os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{path}"
    try:
        built = cpp_extension.load(
            f"explib_{hashlib.sha256(what).hexdigest()[:12]}",
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=[flag for flag in flags if flag.startswith(("-pthread", "-fsanitize"))],
            is_python_module=False,
        )
        return _declared(ctypes.CDLL(built))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        why = (lines or [str(error)])[-1].strip()[:200]
        raise NoCompiler(f"{compiler} could not build {SOURCE.name}: {why}") from None
    finally:
        os.environ["PATH"] = path


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
