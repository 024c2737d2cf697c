"""Which runs are one experiment, and which may be compared."""

from explib.report import selection
from explib.study import records
from tests.report.test_tables import record


def frame(results_dir):
    return records.frame(records.each(results_dir, "cifar10"))


def test_seeds_of_one_dense_network_are_one_group_wherever_its_file_lies(tmp_path):
    record(tmp_path, 92.0, start="a", resume="here.pt")
    record(tmp_path, 93.0, start="a", resume="there.pt", seed=1)
    (run,) = selection.groups(frame(tmp_path)).to_dict("records")
    assert (run["n"], run["last"], run["by_seed"]) == (2, 92.5, {0: 92.0, 1: 93.0})


def test_seeds_of_another_dense_network_are_not_in_it(tmp_path):
    record(tmp_path, 92.0, start="a")
    record(tmp_path, 93.0, start="b", seed=1)
    found = selection.groups(frame(tmp_path))
    assert sorted(found[["start", "n", "last"]].values.tolist()) == [["a", 1, 92.0], ["b", 1, 93.0]]


def test_what_is_compared_starts_from_one_dense_network(tmp_path):
    record(tmp_path, 95.0, start="new")
    for way, last in (("random", 90.0), ("l1", 91.0)):
        record(tmp_path, last, start="old", pruning_way=way)
    found = selection.compared(frame(tmp_path))
    assert sorted(found["pruning_way"]) == ["l1", "random"]
    assert found["others"].tolist() == [2, 2]
    for way in ("random", "l1", "matched"):
        record(tmp_path, 94.0, start="new", pruning_way=way)
    found = selection.compared(frame(tmp_path))
    assert set(found["start"]) == {"new"} and len(found) == 4


def test_what_is_compared_ran_in_one_environment(tmp_path):
    record(tmp_path, 95.0)
    for way in ("random", "l1"):
        record(tmp_path, 90.0, pruning_way=way, hardware="another")
    found = selection.compared(frame(tmp_path))
    assert sorted(found["pruning_way"]) == ["l1", "random"]
    for seed in (0, 1):
        record(tmp_path, 94.0, pruning_way="l1", seed=seed)
    found = selection.compared(frame(tmp_path))  # three runs against two
    assert set(found["hardware"]) == {"abacus"} and sorted(found["n"]) == [1, 2]
    record(tmp_path, 90.0, hardware="another")
    found = selection.compared(frame(tmp_path))  # as many runs, but of three criteria
    assert set(found["hardware"]) == {"another"} and len(found) == 3
