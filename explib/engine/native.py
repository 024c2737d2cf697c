"""C++ of this package, compiled for the machine it runs on at first use and kept."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from explib.files import cache_dir

FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared")
TARGETS = ("-march=native", "-mcpu=native")  # the first that the compiler takes


class NoCompiler(RuntimeError):
    """The C++ could not be compiled: the message says what is missing."""


def load(source: Path, *more: str) -> ctypes.CDLL:
    """The functions that a C++ file declares `extern "C"`; compiled the first time.

    more: further flags. $CXX names the compiler, `c++` by default; $EXPLIB_CXXFLAGS, where set,
    stands for `-march=native`. What is built is kept in ~/.cache/explib (or $XDG_CACHE_HOME) under
    a name that says what it was made from, and put there whole: any number of processes may build
    it at once, and be killed while they do. Raises NoCompiler.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise NoCompiler(f"there is no C++ compiler {compiler[0]!r}; install g++ or set CXX")
    target = os.environ.get("EXPLIB_CXXFLAGS")
    # a processor is known by the macros that its flags define: one home may serve several machines
    for chosen in TARGETS if target is None else [target]:
        command = [*compiler, *FLAGS, *shlex.split(chosen), *more]
        macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
        if macros.returncode == 0:
            break
    sources = [source, *sorted(source.parent.glob("*.h"))]
    made_from = "\n".join([*command, macros.stdout, *(path.read_text() for path in sources)])
    cache = cache_dir()
    kept = cache / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    try:
        if not kept.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / kept.name
                done = _run([*command, str(source), "-o", str(made)])
                if done.returncode:
                    errors = [line for line in done.stderr.splitlines() if "error" in line]
                    raise NoCompiler(f"{source.name} does not compile: {(errors or ['?'])[0]}")
                os.replace(made, kept)
        return ctypes.CDLL(str(kept))
    except OSError as error:
        raise NoCompiler(f"{source.name} cannot be built in {cache}: {error}") from error


def multiplies_matrices() -> bool:
    """Whether this processor multiplies matrices of bf16 in hardware (AMX), by what torch says."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's numbers, for C++; of None, null."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)
