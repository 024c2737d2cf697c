"""Files are written whole or not at all, and read with one-line errors."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from explib import files


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    path = files.write_text(tmp_path / "a.txt", "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"a\.txt \(No space left on device\)") as caught:
        files.write_text(path, "new")
    assert "\n" not in str(caught.value) and caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_first_write_leaves_nothing(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(OSError, match="cannot write"):
        files.write_text(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        files.write_text(tmp_path / "a/b.txt", "new")


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "b/c/a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two ä")
    assert path.read_bytes() == "two ä".encode()


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path):
    dying = "import os, signal; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    dying += f"from explib import files; files.write_text({str(tmp_path / 'a.txt')!r}, 'new')"
    assert subprocess.run([sys.executable, "-c", dying]).returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    alive = tmp_path / left.replace(left.split(".")[-2], str(os.getppid()))
    alive.write_text("of a writer still at work")
    assert left.startswith(".a.txt.")
    files.write_text(tmp_path / "a.txt", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, "a.txt"])


class TestLocked:
    HOLD = (
        "from explib import files; import sys\n"
        "with files.locked(sys.argv[1]) as waited: print(waited, flush=True); sys.stdin.read()"
    )

    def hold(self, path):
        """Another process that wants the lock, and keeps it until its input ends."""
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        return subprocess.Popen([sys.executable, "-c", self.HOLD, str(path)], text=True, **pipes)

    def test_is_for_one_process_and_the_other_waits_saying_so(self, tmp_path):
        path = tmp_path / "folder/.lock"
        with files.locked(path) as waited:
            assert not waited
            other = self.hold(path)
            said = other.stderr.readline()
            assert said == f"{path.parent}: another process is at work here; waiting\n"
        assert other.stdout.readline() == "True\n"
        with pytest.raises(BlockingIOError), files.locked(path, wait=False):
            pass
        other.communicate()
        with files.locked(path, wait=False) as waited:
            assert not waited

    def test_does_not_outlive_a_killed_process(self, tmp_path):
        other = self.hold(tmp_path / ".lock")
        assert other.stdout.readline() == "False\n"
        other.kill()
        other.communicate()
        with files.locked(tmp_path / ".lock", wait=False) as waited:
            assert not waited

    def test_that_cannot_be_made_is_one_line(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(OSError, match=r"cannot write .*\.lock \(File exists\)$"):
            files.locked(tmp_path / "a/.lock").__enter__()


def test_json_refuses_nan_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_relative_paths_of_a_run_start_at_the_checkout_one_stands_in(tmp_path, monkeypatch):
    for folder in ("study/params", "study/notebooks/deep", "other/params"):
        (tmp_path / folder).mkdir(parents=True)
    for here, start in (
        ("study", "study"),
        ("study/notebooks", "study"),
        ("study/notebooks/deep", "study"),
        ("other/params", "other/params"),  # no checkout: it lacks notebooks/
    ):
        monkeypatch.chdir(tmp_path / here)
        assert files.project() == tmp_path / start
        assert files.resolve("results/a") == tmp_path / start / "results/a"
    assert files.resolve(tmp_path) == tmp_path
    assert files.resolve("~/a") == Path.home() / "a"


def test_tensors_and_meta_come_back(tmp_path):
    tensors = {
        "a": torch.tensor([1.5, float("nan")]),
        "b": torch.arange(6).reshape(2, 3).T,
        "c": torch.ones(2, 2, dtype=torch.bool),
        "d": torch.ones(3, dtype=torch.float16),
        "e": torch.tensor(7),
    }
    meta = {"name": "ä", "nested": [1, {"x": None}]}
    found, read = files.load_tensors(files.save_tensors(tmp_path / "t.safetensors", tensors, meta))
    assert read == meta and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_a_truncated_file_is_a_value_error_that_names_it(tmp_path, size):
    path = files.save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"t\.safetensors: not a readable safetensors file"):
        files.load_tensors(path)


def test_meta_that_is_no_json_is_a_value_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "t.safetensors", metadata={"explib": "{"})
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        files.load_tensors(tmp_path / "t.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t\.safetensors: no such file"):
        files.load_tensors(tmp_path / "t.safetensors")


def test_sha256_of_a_known_text(tmp_path):
    path = files.write_text(tmp_path / "a", "abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(path) == known
