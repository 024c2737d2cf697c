"""Several configurations in one process: their order, and what stops them. Runs are made up."""

import contextlib
import time

import pytest

from explib.errors import ParamError
from explib.study import batch


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("b.yaml", "a-baseline.yaml")]
    for path in paths:
        path.write_text(f"name: {path.stem}\n")
    return paths


@pytest.fixture
def begun(monkeypatch):
    """The runs that were begun, (kind, name, seed, results_dir); each takes ten seconds."""
    done, now = [], [100.0]
    record = {"accuracy": {"last": 91.0, "best": 92.0}, "images_per_s": None}

    def make(kind):
        def run(params):
            done.append((kind, params.name, params.seed, params.results_dir))
            now[0] += 10
            print("on standard error")
            return record

        return run

    monkeypatch.setattr(batch.runs, "baseline", make("baseline"))
    monkeypatch.setattr(batch.runs, "finetune", make("finetune"))
    monkeypatch.setattr(batch.time, "monotonic", lambda: now[0])
    return done


def test_baselines_come_first_and_the_others_once_for_each_seed(files, begun, capsys):
    lines = list(batch.run(files, seeds=2, results_dir="elsewhere"))
    assert begun == [
        ("baseline", "a-baseline", 0, "elsewhere"),
        ("finetune", "b", 0, "elsewhere"),
        ("finetune", "b", 1, "elsewhere"),
    ]
    assert not any(failed for failed, _ in lines) and capsys.readouterr().out == ""
    assert lines[2][1].split() == [
        *("b", "seed", "1", "last", "91.00", "best", "92.00", "0", "images/s", "10", "s")
    ]


def test_none_is_begun_that_may_end_too_late(files, begun):
    lines = [line for _, line in batch.run(files, seeds=3, seconds=30)]
    assert len(begun) == 3  # 10 + 10 s are over, and a third one of 10 ends in time
    assert lines[3] == "b, seed 2: not begun, the time is over"


def test_a_wrong_file_stops_all_before_anything_runs(files, begun, tmp_path):
    (tmp_path / "wrong.yaml").write_text("filters: 3")
    with pytest.raises(ParamError, match=r"wrong.yaml: unknown parameter 'filters'"):
        next(batch.run([*files, tmp_path / "wrong.yaml"]))
    assert begun == []


class TestAtOnce:
    """Threads that share a GPU, here without one: what is begun when, not how it computes."""

    @pytest.fixture(autouse=True)
    def there(self, monkeypatch):
        monkeypatch.setattr(batch, "gpu_there", lambda: True)
        monkeypatch.setattr(batch, "_gpu_lost", lambda: False)
        monkeypatch.setattr(batch.torch.cuda, "Stream", lambda priority=0: None)
        monkeypatch.setattr(batch.torch.cuda, "stream", contextlib.nullcontext)

    def made(self, monkeypatch, work):
        """Runs that note their names while they run, and pass their turn in between."""
        now, most = [], []

        def run(params):
            now.append(params.name)
            with batch.turns.passed():
                time.sleep(0.2)
                most.append(tuple(now))
            work(params)
            now.remove(params.name)
            return {"accuracy": {"last": 91.0, "best": 92.0}, "images_per_s": None}

        for kind in ("baseline", "finetune"):
            monkeypatch.setattr(batch.runs, kind, lambda params: run(params))
        return most

    def test_runs_go_beside_each_other_but_wait_for_their_dense_network(self, files, monkeypatch):
        most = self.made(monkeypatch, lambda params: None)
        lines = list(batch.run(files, seeds=3, at_once=2))
        assert [failed for failed, _ in lines] == [False] * 4
        assert most[0] == ("a-baseline",)  # alone: the others start from it
        assert max(map(len, most[1:])) == 2

    def test_another_dense_network_is_not_waited_for(self, files, monkeypatch):
        files[0].write_text("name: b\narch: vgg_16_bn\n")
        most = self.made(monkeypatch, lambda params: None)
        assert len(list(batch.run(files, at_once=2))) == 2
        assert max(map(len, most)) == 2

    def test_what_fails_leaves_the_others(self, files, monkeypatch):
        def work(params):
            if params.seed == 1:
                raise ValueError("lr: 9")

        self.made(monkeypatch, work)
        lines = list(batch.run(files[:1], seeds=3, at_once=3))
        assert sorted(failed for failed, _ in lines) == [False, False, True]
        assert [line for failed, line in lines if failed] == ["b, seed 1: lr: 9"]

    def test_a_lost_gpu_ends_them_all(self, files, monkeypatch):
        def work(params):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(batch, "_gpu_lost", lambda: True)
        self.made(monkeypatch, work)
        lines = list(batch.run(files[:1], seeds=4, at_once=1))
        assert [failed for failed, _ in lines] == [True] * 4
        assert lines[1][1] == (
            "b, seed 1: not begun, the GPU takes no more work of this process; start it again"
        )

    def test_what_no_run_should_raise_is_not_swallowed(self, files, monkeypatch):
        def work(params):
            raise KeyError("a fault of ours")

        self.made(monkeypatch, work)
        with pytest.raises(KeyError, match="a fault of ours"):
            list(batch.run(files[:1], seeds=3, at_once=2))

    def test_equal_runs_are_one(self, files, monkeypatch):
        self.made(monkeypatch, lambda params: None)
        assert len(list(batch.run([files[0], files[0]], at_once=2))) == 1


def test_without_a_gpu_they_come_one_after_another_and_that_is_said(files, begun, capsys):
    assert len(list(batch.run(files, seeds=2, at_once=8))) == 3
    assert "no GPU here" in capsys.readouterr().err


def test_parameters_can_be_changed_for_all(files, begun, monkeypatch):
    seen = []
    keep = batch.runs.finetune
    monkeypatch.setattr(batch.runs, "finetune", lambda p: seen.append(p.epochs) or keep(p))
    list(batch.run(files, epochs=3))
    assert seen == [3]
