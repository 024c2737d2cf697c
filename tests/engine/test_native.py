"""C++ built at first use: whole or absent, once, and with a clear word where it cannot be."""

import os
import shutil
import subprocess
import sys

import pytest

from explib.engine import native

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def source(tmp_path, monkeypatch):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


def test_builds_once_and_again_when_the_source_changes(source, tmp_path, monkeypatch):
    assert native.load(source).answer() == 42
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: pytest.fail("built twice"))
        assert native.load(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    assert native.load(source).answer() == 43
    kept = os.listdir(tmp_path / "cache/explib")
    assert len(kept) == 2 and all(name.endswith(".so") for name in kept)


def test_processes_may_build_at_once(source):
    code = f"""
from pathlib import Path
from explib.engine import native
print(native.load(Path({str(source)!r})).answer())"""
    command = [sys.executable, "-c", code]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in several] == [b"42"] * 3


def test_says_what_does_not_compile_and_leaves_nothing(source, tmp_path):
    source.write_text("#error nothing here\n")
    with pytest.raises(native.NoCompiler, match=r"small.cpp does not compile: .*nothing here"):
        native.load(source)
    assert os.listdir(tmp_path / "cache/explib") == []


def test_other_flags_are_another_library(source, tmp_path, monkeypatch):
    source.write_text('extern "C" int answer() { return ANSWER; }')
    assert native.load(source, "-DANSWER=1").answer() == 1
    monkeypatch.setenv("EXPLIB_CXXFLAGS", "-DANSWER=2")
    assert native.load(source).answer() == 2
    assert len(os.listdir(tmp_path / "cache/explib")) == 2


def test_no_compiler_is_one_line(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.NoCompiler, match="no C\\+\\+ compiler 'no-such-compiler'"):
        native.load(source)


def test_a_cache_that_cannot_be_written_is_one_line(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(native.NoCompiler, match="cannot be built in"):
        native.load(source)
