"""C++ of this package, compiled for the machine it runs on at first use and kept."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp")


class NoCompiler(RuntimeError):
    """The C++ could not be compiled: the message says what is missing."""


def load(source: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The functions that a C++ file declares `extern "C"`; compiled the first time.

    Kept in ~/.cache/explib (or $XDG_CACHE_HOME) under a name that says what it was made from, and
    put there whole: any number of processes may build it at once, and be killed while they do.
    Raises NoCompiler.
    """
    compiler = os.environ.get("CXX", "c++")
    made_from = [source.read_text(), compiler, *flags, platform.machine(), _cpu()]
    digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "explib"
    kept = cache / f"{source.stem}-{digest}.so"
    try:
        if kept.is_file():
            return ctypes.CDLL(str(kept))
        if shutil.which(compiler) is None:
            raise NoCompiler(f"there is no C++ compiler {compiler!r}; install g++")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / kept.name
            command = [compiler, *flags, "-fPIC", "-shared", str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise NoCompiler(f"{source.name} does not compile: {(errors or ['?'])[0]}")
            os.replace(made, kept)
        return ctypes.CDLL(str(kept))
    except OSError as error:
        raise NoCompiler(f"{source.name} cannot be built in {cache}: {error}") from error


def _cpu() -> str:
    """What -march=native depends on: a folder of home may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
