"""Where things lie, how files are written (whole or not at all), and by whom: one at a time."""

import fcntl
import glob
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cache_dir() -> Path:
    """Where this machine keeps what any project may share: ~/.cache/explib, or $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "explib"


def project() -> Path:
    """Find where the relative paths of a run's parameters start.

    The checkout one stands in: the nearest folder, from the working directory upwards, that has
    the study's params/ and notebooks/, so that a notebook run in notebooks/ uses the same results/
    as everything else. Outside a checkout, the working directory.
    """
    here = Path.cwd()
    above = (here, *here.parents)
    return next((f for f in above if (f / "params").is_dir() and (f / "notebooks").is_dir()), here)


def resolve(path: str | Path) -> Path:
    """Make a run's path absolute; a relative one starts at `project()`.

    For what parameters name: results_dir, job_dir, data_dir, resume, resume_mask. A path given to a
    function that loads or saves one file is as everywhere in Python: relative to the working
    directory.
    """
    path = Path(path).expanduser()
    return path if path.is_absolute() else (project() / path).resolve()


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write `content` so that `path` is at every moment absent, the old file or the new one.

    Raises OSError, naming the file, on a full disk or a read-only folder; the old file stays. What
    a writer that was killed has left beside `path` goes with the next write.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{platform.node()}."  # then the writer's process, and some chance
        _sweep(path.parent, prefix)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{prefix}{os.getpid()}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise OSError(
            error.errno, f"cannot write {path} ({error.strerror}); what was there is unchanged"
        ) from None
    return path


def _sweep(folder: Path, prefix: str) -> None:
    """Remove the temporary files of processes of this machine that are no more."""
    for left in folder.glob(f"{glob.escape(prefix)}*.*"):
        try:
            os.kill(int(left.name.removeprefix(prefix).split(".")[0]), 0)  # asks, sends nothing
        except (ProcessLookupError, OverflowError):
            left.unlink(missing_ok=True)
        except (PermissionError, ValueError):  # alive, of another user; or not named by us
            continue


@contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of the file `path`, which is made and stays: one process at a time.

    The operating system lets go of it however the process ends, so that no lock is ever left
    behind. Where another process has it: BlockingIOError, or with `wait` one line on stderr, and
    its turn. Yields whether it had to wait. OSError, naming the file, where it cannot be made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path} ({error.strerror})") from None
    with os.fdopen(handle) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except BlockingIOError:
            if not wait:
                raise
            print(f"{path.parent}: another process is at work here; waiting", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
            waited = True
        yield waited


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text whole; see `write_bytes`."""
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value) -> Path:
    """Write `value` as indented JSON, whole; NaN and infinity are refused (ValueError)."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, "torch.Tensor"], meta: dict) -> Path:
    """Write tensors as safetensors with `meta`, any JSON value, under the key `explib`."""
    from safetensors.torch import save  # brings torch, which takes seconds to import

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        about = json.dumps(meta)
    except TypeError as error:
        raise ValueError(f"meta: {error}; give numbers, text, lists and dicts") from None
    return write_bytes(path, save(tensors, metadata={"explib": about}))


def load_tensors(path: str | Path) -> tuple[dict[str, "torch.Tensor"], dict]:
    """Read a file of `save_tensors`: (tensors, meta). ValueError for what is not one."""
    with _opened(path) as (file, meta):
        return {name: file.get_tensor(name) for name in file.keys()}, meta


def load_meta(path: str | Path) -> dict:
    """What a file of `save_tensors` says of itself. ValueError for what is not one."""
    with _opened(path) as (_, meta):
        return meta


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        what = "is a folder; give a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("explib", "{}"))
            if not isinstance(meta, dict):
                raise ValueError(f"its meta data are a {type(meta).__name__}")
            yield file, meta
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
