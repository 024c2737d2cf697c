"""A large file over an unreliable line: with progress, continued where it stopped, checked."""

import hashlib
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

CHUNK = 1 << 16


class DownloadError(RuntimeError):
    """What could not be had, and why."""


def fetch(url: str, path: Path, md5: str, attempts: int = 5, wait_s: float = 2.0) -> Path:
    """Download `url` to `path`, unless it is there already; its MD5 is checked in any case.

    What has arrived stays in `path`.part, and the next attempt, or the next call, asks for the rest
    only. Raises DownloadError after `attempts` that brought nothing new, or for a wrong MD5.
    """
    part = path.with_name(f"{path.name}.part")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        while True:
            before = part.stat().st_size if part.is_file() else 0
            try:
                _continue(url, part, path.name)
                break
            except (OSError, urllib.error.URLError, ValueError, EOFError) as error:
                grown = part.is_file() and part.stat().st_size > before
                failures = 0 if grown else failures + 1
                if failures >= attempts:
                    have = part.stat().st_size if part.is_file() else 0
                    raise DownloadError(
                        f"{url}: {error} (attempt {attempts}; {have:,} bytes are kept in {part})"
                    ) from None
                time.sleep(wait_s)
        os.replace(part, path)
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != md5:
        path.unlink()
        raise DownloadError(f"{url}: its MD5 is {found}, not {md5}; deleted, try another data_url")
    return path


def _continue(url: str, part: Path, name: str) -> None:
    """Append what `part` lacks of the file at `url`; EOFError if the line breaks before its end."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond what is here: it is all here
            return
        raise
    with answer:
        if have and answer.status != 206:  # a server that cannot continue sends all of it
            have = 0
        total = have + int(answer.headers.get("Content-Length") or 0)
        with (
            open(part, "ab" if have else "wb") as stream,
            tqdm(
                total=total or None,
                initial=have,
                desc=name,
                unit="B",
                unit_scale=True,
                mininterval=1 if sys.stderr.isatty() else 30,
            ) as bar,
        ):
            while chunk := answer.read(CHUNK):
                stream.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < total:
        raise EOFError(f"the connection broke off at {part.stat().st_size:,} of {total:,} bytes")


def unpack(archive: Path, folder: str, into: Path) -> Path:
    """Extract `folder` of a tar file into `into`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=into) as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
        os.replace(Path(temporary) / folder, into / folder)
    return into / folder
