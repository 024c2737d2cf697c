"""Timing with a clock of its own, and what is remembered of it."""

import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from explib.training import timing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that has asked nothing yet."""
    monkeypatch.setattr(timing, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(timing, "_known", {})
    monkeypatch.delenv("EXPLIB_MEASURE", raising=False)
    return tmp_path / "measured"


class Ways:
    """Ways that take the seconds that they are given, one after another, the last for ever."""

    def __init__(self, monkeypatch, **seconds):
        self.now, self.calls, self.seconds = 0.0, [], seconds
        monkeypatch.setattr(timing, "clock", lambda: self.now)

    def __call__(self, name):
        own = self.seconds[name]
        self.now += own[min(self.calls.count(name), len(own) - 1)]
        self.calls.append(name)

    def speeds(self, images):
        return timing.speeds({name: lambda name=name: self(name) for name in self.seconds}, images)


class TestSpeeds:
    def test_by_turns_the_median_without_the_first(self, monkeypatch):
        ways = Ways(monkeypatch, a=[0.9, 0.25, 0.5, 0.2], b=[0.5, 0.4, 0.4, 0.4])
        assert ways.speeds(10) == {"a": 40.0, "b": 25.0}
        assert ways.calls == ["a", "b"] * 4

    def test_the_hopeless_are_timed_no_further(self, monkeypatch):
        # b is slow to warm up only; c is twice as slow as a, d five times from the first on
        ways = Ways(monkeypatch, a=[0.1], b=[0.35, 0.1], c=[0.25, 0.25], d=[0.5])
        assert ways.speeds(10) == {"a": 100.0, "b": 100.0, "c": 40.0, "d": 20.0}
        assert [ways.calls.count(name) for name in "abcd"] == [4, 4, 2, 1]

    def test_slow_ones_are_timed_once(self, monkeypatch):
        ways = Ways(monkeypatch, a=[4.0], b=[3.0])
        assert ways.speeds(12) == {"a": 3.0, "b": 4.0}
        assert ways.calls == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"x, fp32": 100, "x, bf16": 119}, ["x, fp32", "x, bf16"]),
        ({"x, fp32": 100, "x, bf16": 120}, ["x, bf16", "x, fp32"]),
        ({"x, fp32": 100, "y, fp32": 101}, ["y, fp32", "x, fp32"]),
        (
            {"x, fp32": 90, "y, fp32": 100, "y, bf16": 110, "x, fp16": 115},
            ["y, fp32", "x, fp16", "y, bf16", "x, fp32"],
        ),
        ({"x, bf16": 1, "y, bf16": 2}, ["y, bf16", "x, bf16"]),
        ({}, []),
    ],
)
def test_fp32_unless_another_is_clearly_faster(found, wanted):
    assert timing.ranking(found) == wanted


class TestRemembered:
    def answer(self, question, *found):
        """What is answered where measuring would find these, one after another."""
        left = list(found)
        return timing.remembered(question, lambda: left.pop(0))

    def test_is_asked_once_a_machine(self, cache, monkeypatch):
        assert self.answer({"what": "x"}, {"a, fp32": 1.5}) == {"a, fp32": 1.5}
        assert self.answer({"what": "x"}) == {"a, fp32": 1.5}
        monkeypatch.setattr(timing, "_known", {})  # another process
        assert self.answer({"what": "x"}) == {"a, fp32": 1.5}
        (path,) = cache.glob("*.json")
        kept = json.loads(path.read_text())
        assert kept["images_per_s"] == {"a, fp32": 1.5} and kept["question"]["what"] == "x"
        assert kept["question"]["processor"] == timing.processor() != ""

    def test_another_question_or_machine_is_measured(self, monkeypatch):
        self.answer({"what": "x"}, {"a": 1.0})
        assert self.answer({"what": "y"}, {"a": 2.0}) == {"a": 2.0}
        torch = timing.torch
        for change in (
            lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
            lambda patch: patch.setattr(torch, "__version__", "0.1"),
            lambda patch: patch.setattr(torch, "get_num_threads", lambda: 63),
        ):
            with monkeypatch.context() as patch:
                change(patch)
                assert self.answer({"what": "x"}, {"a": 3.0}) == {"a": 3.0}
        assert self.answer({"what": "x"}) == {"a": 1.0}

    def test_is_renewed_when_asked_to_and_when_deleted(self, cache, monkeypatch):
        self.answer({"what": "x"}, {"a": 1.0})
        monkeypatch.setattr(timing, "_known", {})
        monkeypatch.setenv("EXPLIB_MEASURE", "again")
        assert self.answer({"what": "x"}, {"a": 2.0}) == {"a": 2.0}
        assert self.answer({"what": "x"}) == {"a": 2.0}  # once in a process
        monkeypatch.delenv("EXPLIB_MEASURE")
        monkeypatch.setattr(timing, "_known", {})
        assert self.answer({"what": "x"}) == {"a": 2.0}
        monkeypatch.setattr(timing, "_known", {})
        for path in cache.glob("*.json"):
            path.unlink()
        assert self.answer({"what": "x"}, {"a": 3.0}) == {"a": 3.0}

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"question": 1, "images_per_s": {}}', '{"images_per_s": []}']
    )
    def test_a_damaged_file_is_made_anew(self, cache, monkeypatch, content):
        self.answer({"what": "x"}, {"a": 1.0})
        (path,) = cache.glob("*.json")
        path.write_text(content)
        monkeypatch.setattr(timing, "_known", {})
        assert self.answer({"what": "x"}, {"a": 2.0}) == {"a": 2.0}
        assert json.loads(path.read_text())["images_per_s"] == {"a": 2.0}

    def test_what_cannot_be_kept_is_said_and_used(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(timing, "cache_dir", lambda: tmp_path / "file")
        with pytest.warns(UserWarning, match="not kept: .*cannot write"):
            assert self.answer({"what": "x"}, {"a": 1.0}) == {"a": 1.0}
        assert self.answer({"what": "x"}) == {"a": 1.0}

    def test_of_two_at_once_one_measures(self):
        def measure(name):
            time.sleep(0.5)
            return {name: 1.0}

        def ask(name):  # each opens the lock itself, as two processes would
            return timing.remembered({"what": "x"}, lambda: measure(name))

        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(ask, ["a", "b"])
        assert one == two


class TestProcessor:
    EPYC = "processor\t: 0\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"

    def said(self, tmp_path, monkeypatch, text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(timing, "CPUINFO", tmp_path / "cpuinfo")
        return timing.processor()

    def test_generations_of_one_name_are_told_apart(self, tmp_path, monkeypatch):
        text = self.EPYC.format(25, 17) + self.EPYC.format(26, 2)
        assert self.said(tmp_path, monkeypatch, text) == "AMD EPYC family 25 model 17"

    def test_without_numbers_it_is_the_name(self, tmp_path, monkeypatch):
        assert self.said(tmp_path, monkeypatch, "model name : A: B\n") == "A: B"

    @pytest.mark.parametrize("text", ["", "CPU part\t: 0xd40\n"])
    def test_without_a_name_it_is_what_python_says(self, tmp_path, monkeypatch, text):
        wanted = platform.processor() or platform.machine()
        assert self.said(tmp_path, monkeypatch, text) == wanted != ""
