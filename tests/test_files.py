import errno
import os

import pytest
import torch

from explib import files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt \(No space left on device\)"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/a\.txt"):
        files.write_text(tmp_path / "file" / "a.txt", "x")


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(3), "c": torch.tensor([True, False])}
    path = files.save_tensors(tmp_path / "t.safetensors", tensors, {"x": [1, None]})
    found, meta = files.load_tensors(path)
    assert meta == {"x": [1, None]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("keep", [0, 4, 60])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = files.save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(9)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.safetensors: not a readable"):
        files.load_tensors(path)


def test_nan_is_refused_in_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_relative_paths_start_at_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.resolve("results") == files.ROOT / "results"
