"""Several configurations in one process: their order, and what stops them. Runs are made up."""

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
