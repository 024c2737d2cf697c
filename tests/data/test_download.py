"""Downloads from a server on the loopback that breaks off, cannot continue, or lies."""

import hashlib
import io
import tarfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from explib.data.download import DownloadError, fetch, unpack

CONTENT = bytes(range(256)) * 2000  # half a megabyte
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, `burst` bytes a connection at most; with ranges, or without."""

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + server.burst])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.ranges, server.burst = [], True, len(CONTENT)
    server.url = f"http://127.0.0.1:{server.server_address[1]}/data.tar.gz"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


get = partial(fetch, md5=MD5, wait_s=0)


def test_a_file_arrives_whole_and_is_not_fetched_again(server, tmp_path):
    path = get(server.url, tmp_path / "new/data")
    assert path.read_bytes() == CONTENT
    assert get(server.url, path) == path and server.asked == [None]
    assert [entry.name for entry in path.parent.iterdir()] == ["data"]


def test_a_line_that_breaks_is_continued(server, tmp_path):
    server.burst = 200_000
    assert get(server.url, tmp_path / "data").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=200000-", "bytes=400000-"]


def test_a_later_call_continues(server, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT[:300_000])
    assert get(server.url, tmp_path / "data").read_bytes() == CONTENT
    assert server.asked == ["bytes=300000-"]


def test_all_there_but_not_renamed(server, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT)
    assert get(server.url, tmp_path / "data").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "data.part").write_bytes(b"x" * 1000)
    assert get(server.url, tmp_path / "data").read_bytes() == CONTENT


def test_other_content_is_refused_and_deleted(server, tmp_path):
    with pytest.raises(DownloadError, match=r"its MD5 is .*, not 00"):
        fetch(server.url, tmp_path / "data", "00")
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_line_and_keeps_what_is_there(tmp_path):
    (tmp_path / "data.part").write_bytes(b"half")
    with pytest.raises(DownloadError, match=r"refused.*attempt 2; 4 bytes are kept") as caught:
        get("http://127.0.0.1:1/data", tmp_path / "data", attempts=2)
    assert "\n" not in str(caught.value)


def test_unpack_leaves_the_folder_alone(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        entry = tarfile.TarInfo("folder/file")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    assert (unpack(tmp_path / "x.tar", "folder", tmp_path) / "file").read_bytes() == b"abc"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "x.tar"]


def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.TarError):
        unpack(tmp_path / "x.tar", "folder", tmp_path)
    assert not (tmp_path.parent / "outside").exists()
