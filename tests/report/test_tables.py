"""Tables from records whose every number is written down here."""

import json
import re

import pandas as pd
import pytest

from explib.params import Params
from explib.report import comparisons, markup, names, tables
from explib.study import records
from tests.conftest import ROOT

RATES = "[0.0]+[0.4]*17+[0.5]*2+[0.6]*16+[0.4]*2+[0.6]*17"


def record(
    results_dir,
    last=92.0,
    status="done",
    kind="finetune",
    sparsity=0.5,
    trained=None,
    hardware="abacus",
    start="",
    environment=None,
    **fields,
):
    """Write a made-up record of ResNet-56's 53.5 % row; returns its path."""
    environment = {"precision": "fp32", "torch": "2.0"} | (environment or {})
    fields = {"dataset": "cifar10", "compress_rate": RATES, "name": "made-up"} | fields
    params = Params(results_dir=str(results_dir), **fields)
    entry = {
        "schema": 1,
        "kind": kind,
        "status": status,
        "params": params.asdict(),
        "hardware": {
            "device": "cpu", "name": hardware, "threads": 1, "precision": environment["precision"]
        },
        "macs": {"dense": 125_485_696, "left": 62_742_848, "published_m": 58.272},
        "weights": {"dense": 853_018, "left": 400_000},
        "accuracy": {
            "dense": 93.0, "before": 40.0, "last": last, "best": last + 0.5, "best_epoch": 1
        },
        "sparsity": sparsity,
        "nominal_sparsity": 0.5,
        "layers": [
            {"name": "conv1", "kernels": 48, "nominal": 24, "pruned": 20,
             "macs_dense": 442_368, "macs": 258_048},
        ],
        "history": [{"epoch": 1, "stage": 0, "top1": last}] * (trained or params.epochs),
        "wall_s": 1.0,
        "images_per_s": 100.0,
        "provenance": {
            "checkpoint_sha256": start, "versions": {"torch": environment["torch"]}
        },
    }  # fmt: skip
    return records.write(entry, results_dir)


def row(results_dir, way="B", table="as_published"):
    made = tables.make(results_dir, "cifar10")[table]
    chosen = made[(made["network"] == "ResNet-56") & (made["published cut %"] == "53.5")]
    return chosen[chosen["way"] == way].iloc[0]


def test_one_record_fills_its_row_and_no_other(tmp_path):
    record(tmp_path)
    got = row(tmp_path)
    assert got["true cut %"] == "50.00"
    # 1 - 58.272 / 125.485696
    assert got["cut by its convention %"] == "53.56"
    assert (got["published top-1"], got["last epoch"]) == ("93.82", "92.00 (n=1)")
    assert (got["best epoch"], got["before fine-tuning"]) == ("92.50", "40.00")
    assert (got["change"], got["epochs"], got["weights M"]) == ("-1.00", "10", "0.400")
    assert (got["kernels pruned %"], got["hardware"]) == ("50.00", "abacus")
    made = tables.make(tmp_path, "cifar10")
    assert (made["as_published"]["last epoch"] == names.NOT_MEASURED).sum() == 11
    assert (made["ours"]["last epoch"] == names.NOT_MEASURED).all()


def test_seeds_are_averaged_with_their_spread(tmp_path):
    for seed, last in enumerate((92.0, 92.3, 92.9)):
        record(tmp_path, last, seed=seed)
    # mean 92.4, deviations -0.4 -0.1 0.5: sqrt((0.16 + 0.01 + 0.25) / 2) = 0.458
    assert row(tmp_path)["last epoch"] == "92.40 ± 0.46 (n=3)"


def test_seeds_of_another_machine_precision_or_torch_are_not_averaged(tmp_path):
    record(tmp_path, 92.0)
    record(tmp_path, 93.0, hardware="slide rule")
    record(tmp_path, 92.9, hardware="slide rule", seed=1)
    # of two machines the one with more seeds: deviations of 0.05, sqrt(2 * 0.0025)
    assert row(tmp_path)["last epoch"] == "92.95 ± 0.07 (n=2)"
    assert row(tmp_path)["hardware"] == "slide rule"
    for changed in ({"precision": "bf16"}, {"torch": "3.0"}):
        record(tmp_path, 80.0, hardware="slide rule", seed=2, environment=changed)
        assert row(tmp_path)["last epoch"] == "92.95 ± 0.07 (n=2)"


def test_most_epochs_win_then_most_seeds(tmp_path):
    record(tmp_path, 95.0, seed=0, lr=0.1)
    record(tmp_path, 95.0, seed=1, lr=0.1)
    record(tmp_path, 91.0, lr=0.2)
    assert row(tmp_path)["last epoch"].endswith("(n=2)")
    record(tmp_path, 90.0, epochs=11)
    assert row(tmp_path)["last epoch"] == "90.00 (n=1)"


@pytest.mark.parametrize(
    ("runs", "lasts"),
    [
        ((("a", 10, 92.0), ("a", 5, 91.0), ("b", 5, 93.0)), ["92.00 (n=1)"]),
        ((("a", 10, 92.0), ("a", 5, 91.0), ("b", 10, 93.0)), ["92.00 (n=1)", "93.00 (n=1)"]),
    ],
    ids=["the longest", "as long"],
)
def test_a_row_stands_once_for_each_dense_network_of_its_longest_runs(tmp_path, runs, lasts):
    for start, epochs, last in runs:
        record(tmp_path, last, start=start, epochs=epochs, resume=start)
    made = tables.make(tmp_path, "cifar10")["as_published"]
    measured = made[made["last epoch"] != names.NOT_MEASURED]
    assert sorted(measured["last epoch"]) == lasts
    assert list(measured["dense"]) == ["93.00"] * len(lasts)
    assert len(made) == 12 + len(lasts) - 1


def test_rows_that_reach_what_was_published_are_counted():
    rows = {
        "network": ["VGG-16", "VGG-16", "ResNet-56", "ResNet-56"],
        "way": ["A", "B", "A", "B"],
        "published cut %": ["53.1", "53.1", "71.9", "71.9"],
        "published top-1": ["93.64", "93.55", "92.91", "93.03"],
        "last epoch": ["93.64 (n=1)", "93.50 ± 0.10 (n=3)", "92.00 (n=1)", names.NOT_MEASURED],
        "records": [["a"], ["b", "c"], ["d"], None],
    }
    (line,) = tables.reached({"L1": pd.DataFrame(rows), "random": pd.DataFrame()}).to_dict(
        "records"
    )
    assert line == {
        "survivors": "L1",
        "rows": "3",
        "at or above": "1",
        "less than 0.1 below": "1",
        "mean difference": "-0.32",  # of 0, -0.05 and -0.91
        "furthest below": "-0.91",
        "that is": "ResNet-56, A, 71.9 %",
        "records": ["a", "b", "c", "d"],
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "diverged"},
        {"limit_train": 100},
        {"limit_test": 100},
        {"validation": 100},
        {"groups": 5},
        {"keep_floor": 0.0},
        {"strict_rate": True},
        {"start_cov": 3},
        {"bias_in_score": True},
        {"freeze_bn": True},
        {"resume_mask": "masks.safetensors"},
        {"kind": "baseline"},
        {"compress_rate": "[0.5]"},
    ],
    ids=str,
)
def test_what_is_no_result_of_the_row_never_shows_as_one(tmp_path, fields):
    record(tmp_path, **fields)
    assert row(tmp_path)["last epoch"] == names.NOT_MEASURED


def test_rates_that_nobody_published_follow_those_that_were(tmp_path):
    record(tmp_path, 91.0, compress_rate="[0.25]")
    record(tmp_path, 90.0, compress_rate="[0.25]", epochs=1)
    table = tables.make(tmp_path, "cifar10")["as_published"]
    assert len(table) == 13 and set(table["last epoch"][:12]) == {"not measured yet"}
    last = table.iloc[-1]
    assert (last["published cut %"], last["last epoch"]) == ("", "91.00 (n=1)")


def test_conv_by_conv_nothing_is_before_fine_tuning(tmp_path):
    record(tmp_path, 84.0, schedule="layerwise", epochs=1, trained=54)
    assert row(tmp_path)["before fine-tuning"] == ""


def test_a_baseline_on_a_part_of_the_data_is_none(tmp_path):
    record(tmp_path, kind="baseline", limit_test=100, name="part")
    record(tmp_path, kind="baseline", name="whole", epochs=2)
    table = tables.make(tmp_path, "cifar10")["baselines"]
    assert table[["name", "epochs"]].values.tolist() == [["whole", "2"]]


def test_falling_short_of_the_rate_shows(tmp_path):
    record(tmp_path, sparsity=0.4567, pruning_way="A")
    assert row(tmp_path, "A")["kernels pruned %"] == "45.67 of 50.00"


def test_deleting_a_record_removes_its_row_and_nothing_else(tmp_path):
    path = record(tmp_path, pruning_way="A")
    record(tmp_path, 91.5)
    record(tmp_path, 92.5, survivors="l1")
    before = tables.make(tmp_path, "cifar10")
    path.unlink()
    after = tables.make(tmp_path, "cifar10")
    assert row(tmp_path, "A")["last epoch"] == names.NOT_MEASURED
    assert row(tmp_path)["last epoch"] == "91.50 (n=1)"
    assert after["ours"].equals(before["ours"]) and after["flops"].equals(before["flops"])


def test_criteria_stand_side_by_side_once_there_are_some(tmp_path):
    record(tmp_path)
    assert "criteria" not in tables.make(tmp_path, "cifar10")
    record(tmp_path, 90.0, pruning_way="random")
    made = tables.make(tmp_path, "cifar10")["criteria"]
    assert made[["criterion", "last epoch"]].values.tolist() == [
        ["B, random survivors", "92.00 (n=1)"],
        ["random kernels", "90.00 (n=1)"],
    ]


def test_a_record_edited_by_hand_is_named(tmp_path):
    path = record(tmp_path)
    path.write_text(json.dumps({"schema": 1}))
    with pytest.raises(ValueError, match=f"{path.name}.*not a record, lacks kind"):
        tables.make(tmp_path, "cifar10")
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tables.make(tmp_path, "cifar10")


def test_files_in_three_forms(tmp_path):
    record(tmp_path)
    written = tables.build(tmp_path, "cifar10")
    assert {path.suffix for path in written} == {".csv", ".md", ".html"}
    page = next(path for path in written if path.name == "as_published.html").read_text()
    assert "92.00 (n=1)" in page and "viewport" in page and "prefers" not in page
    assert page.count("<tr>") == 13 and "http" not in page


def test_other_data_has_its_own_rows(tmp_path):
    record(tmp_path, dataset="digits", compress_rate="[0.5]", limit_train=10)
    made = tables.make(tmp_path, "digits")
    assert list(made) == ["as_published"]
    assert made["as_published"]["last epoch"].tolist() == ["92.00 (n=1)"]


def test_a_table_is_put_between_its_marks(tmp_path):
    record(tmp_path)
    made = tables.make(tmp_path, "cifar10")
    text = "a\n<!-- table:ours -->\nold\n<!-- /table:ours -->\nb\n"
    filled = markup.fill(text, made)
    assert filled.startswith("a\n<!-- table:ours -->\n| network |") and "old" not in filled
    assert filled.endswith("|\n<!-- /table:ours -->\nb\n") and markup.fill(filled, made) == filled


def test_a_mark_chooses_columns_and_their_order(tmp_path):
    record(tmp_path, hardware="abacus (10 beads)")
    text = "<!-- table:as_published | hardware | way -->\n<!-- /table:as_published -->\n"
    filled = markup.fill(text, tables.make(tmp_path, "cifar10"))
    head, rule, *lines = filled.splitlines()[1:-1]
    assert (head, rule) == ("| hardware | way |", "| --- | --- |")
    assert lines.count("| abacus | B |") == 1 and lines.count("|  | A |") == 6
    assert filled.splitlines()[0] == text.splitlines()[0]
    assert markup.fill(text, {}) == text


NUMBERS = {
    "ours": pd.DataFrame(
        {
            "way": ["A", "B", "B"],
            "cut": ["53.5", "53.5", "71.9"],
            "last epoch": ["92.64 (n=1)", "93.28 ± 0.10 (n=2)", names.NOT_MEASURED],
            "change": ["-0.75", "+0.11", ""],
        }
    ),
    "gains": pd.DataFrame({"way": ["A"], "gain over int8": ["2.3"]}),
}


@pytest.mark.parametrize(
    "mark, found",
    [
        ("n:ours; A; 53.5; last epoch", "92.64"),
        ("n:ours; A; change", "-0.75"),
        ("n:ours; B; 53.5; change", "0.11"),
        ("n:ours; cut=53.5; way=B; last epoch", "93.28"),
        ("cell:ours; B; 53.5; last epoch", "93.28 ± 0.10 (n=2)"),
        ("n:ours; B; 53.5; last epoch minus ours; A; last epoch", "+0.64"),
        ("n:gains; A; gain over int8", "2.3"),  # a column, not a quotient
        ("n:ours; A; last epoch over ours; A; cut", "1.7"),  # 92.64 / 53.5 = 1.73
        ("n:ours; B; 71.9; last epoch", "not measured yet"),
        ("n:ours; B; 71.9; change", "not measured yet"),
        ("n:ours; C; last epoch", "not measured yet"),
        ("n:ours; A; last epoch minus ours; C; last epoch", "not measured yet"),
        ("n:elsewhere; A; last epoch", "as it was"),
    ],
)
def test_a_number_is_put_between_its_marks(mark, found):
    kind = mark.partition(":")[0]
    text = f"reaches <!-- {mark} -->as it was<!-- /{kind} --> % and more"
    wanted = f"reaches <!-- {mark} -->{found}<!-- /{kind} --> % and more"
    assert markup.fill(text, NUMBERS) == wanted


@pytest.mark.parametrize(
    "place, message",
    [("ours; B; last epoch", "2 rows of ours"), ("ours; A; first", "no column 'first'")],
)
def test_a_mark_of_several_rows_or_of_no_column_is_an_error(place, message):
    with pytest.raises(ValueError, match=f"{place}: .*{message}"):
        markup.fill(f"<!-- n:{place} --><!-- /n -->", NUMBERS)


PAGES = [path for names in tables.PAGES for path in sorted(ROOT.glob(names))]


@pytest.fixture(scope="module")
def made():
    return tables.make()


def test_the_pages_name_tables_and_columns_there_are(made):
    text = "".join(path.read_text() for path in PAGES)
    marks = re.findall(r"<!-- table:(\w+)(.*?) -->", text)
    assert len(marks) > 15
    for name, columns in marks:
        assert set(column.strip() for column in columns.split("|")[1:]) <= set(made[name]), name
    places = re.findall(r"<!-- (?:n|cell):(.*?) -->", text)
    assert len(places) > 50
    for place in places:
        assert all(
            p.split(";")[0].strip() in made for p in re.split(r" (?:minus|over) (?=\w+;)", place)
        )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_shows_what_the_committed_records_say(path, made):
    text = path.read_text()
    assert markup.fill(text, made) == text, "run `make tables`"
    assert not re.search(r"<!-- (n|cell):[^>]*-->not measured", text)
    assert len(re.findall("<!-- (?:table|n|cell):", text)) == len(
        re.findall("<!-- /(?:table|n|cell)", text)
    )


def test_what_a_page_lacks_is_said_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"README.md: has no table"):
        tables.build(tmp_path / "found", pages=tmp_path)
    (tmp_path / "docs").mkdir()
    mark = "<!-- table:flops | network -->\n<!-- /table:flops -->\n"
    for name in ("README.md", "docs/one.md"):
        (tmp_path / name).write_text(mark)
    (tmp_path / "docs/two.md").write_text("no marks")
    written = tables.build(tmp_path / "found", pages=tmp_path)
    assert written[:2] == [tmp_path / "README.md", tmp_path / "docs/one.md"]
    assert "| VGG-16 |" in (tmp_path / "docs/one.md").read_text()
    assert tmp_path / "docs/two.md" not in written


def test_no_records_make_no_tables(tmp_path):
    assert tables.make(tmp_path, "digits") == {}


class TestCriteria:
    def test_differences_are_paired_by_seed(self, tmp_path):
        for seed, (ours, other) in enumerate(((91.0, 90.0), (93.0, 91.0), (92.0, 89.0))):
            record(tmp_path, ours, seed=seed)
            record(tmp_path, other, seed=seed, pruning_way="random")
        record(tmp_path, 80.0, seed=7, pruning_way="random")  # has no partner
        record(tmp_path, 91.5, pruning_way="l1")
        found = tables.make(tmp_path, "cifar10")["criteria"].set_index("criterion")
        # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641, of 2 degrees of freedom, of which
        # 95 % lie within 4.3027: 2 ± 4.3027 / sqrt(3)
        ours, l1, random = (
            found.loc[name] for name in ("B, random survivors", "L1 kernels", "random kernels")
        )
        assert ours["against random kernels"] == "+2.00 ± 2.48 (p = 0.074, n=3)"
        assert l1["against random kernels"] == "+1.50 (n=1)"
        assert random["against random kernels"] == ""
        assert ours["against L1 kernels"] == "-0.50 (n=1)" and l1["against L1 kernels"] == ""
        assert ours["against B's norms"] == ""
        record(tmp_path, 90.5, pruning_way="matched")
        found = tables.make(tmp_path, "cifar10")["criteria"].set_index("criterion")
        assert found.loc["B, random survivors", "against B's norms"] == "+0.50 (n=1)"

    def test_what_ran_elsewhere_is_not_compared(self, tmp_path):
        record(tmp_path, 91.0)
        record(tmp_path, 90.0, pruning_way="random", hardware="slide rule")
        record(tmp_path, 92.0, pruning_way="l1", hardware="slide rule")
        found = tables.make(tmp_path, "cifar10")["criteria"].set_index("criterion")
        assert list(found.index) == ["L1 kernels", "random kernels"]
        assert found.loc["L1 kernels", "against random kernels"] == "+2.00 (n=1)"
        record(tmp_path, 91.5, hardware="slide rule")
        found = tables.make(tmp_path, "cifar10")["criteria"].set_index("criterion")
        assert found.loc["B, random survivors", "against random kernels"] == "+1.50 (n=1)"

    def test_other_machines_have_a_table_of_what_they_ran_with_several_seeds(self, tmp_path):
        for seed, (ours, other) in enumerate(((91.0, 90.0), (93.0, 91.0), (92.0, 89.0))):
            record(tmp_path, ours, seed=seed)
            record(tmp_path, other, seed=seed, pruning_way="random")
        assert "elsewhere" not in tables.make(tmp_path, "cifar10")
        for hardware in ("slide rule", "sand"):
            record(tmp_path, 88.0, pruning_way="random", hardware=hardware)
            record(tmp_path, 88.5, hardware=hardware)
        assert "elsewhere" not in tables.make(tmp_path, "cifar10")  # one seed each
        record(tmp_path, 88.0, pruning_way="random", hardware="sand", seed=1)
        record(tmp_path, 88.7, hardware="sand", seed=1)
        made = tables.make(tmp_path, "cifar10")
        assert set(made["criteria"]["hardware"]) == {"abacus"}
        found = made["elsewhere"].set_index("criterion")
        assert set(found["hardware"]) == {"sand"} and set(made["elsewhere"]["epochs"]) == {"10"}
        # differences 0.5 and 0.7: t = 0.6 / 0.1, of 1 degree of freedom, 12.706 of which are 95 %
        assert found.loc["B, random survivors", "against random kernels"] == (
            "+0.60 ± 1.27 (p = 0.105, n=2)"
        )

    def test_p_values_are_corrected_for_their_number(self, tmp_path):
        # by hand: 0.01 * 3, then 0.02 * 2 and 0.5 * 1, never less than the one before
        found = comparisons.holm(pd.Series([0.5, 0.01, float("nan"), 0.02]))
        assert found.tolist()[:2] == [0.5, 0.03] and found.isna()[2] and found[3] == 0.04
        assert comparisons.holm(pd.Series([0.4, 0.3])).tolist() == [0.6, 0.6]
        for seed, scores in enumerate(((91.0, 90.0, 90.5), (93.0, 91.0, 91.5), (92.0, 89.0, 89.0))):
            for way, score in zip(("B", "random", "l1"), scores, strict=True):
                record(tmp_path, score, seed=seed, pruning_way=way)
        found = tables.make(tmp_path, "cifar10")["criteria"].set_index("criterion")
        # what criteria (92, 90, 90.33) and seeds (90.5, 91.83, 90) leave has a sum of squares of
        # 1.7778, of 4 degrees of freedom: 0.6667 a run, 0.5443 a difference of means of three.
        # t = 2 / 0.5443, of which 95 % lie within 2.7764 and 0.0213 beyond, the smallest of three:
        # B against random kernels and against L1, L1 against random
        difference = found.loc["B, random survivors", "against random kernels"]
        assert difference == "+2.00 ± 1.51 (p = 0.064, n=3)"
        assert found.loc["random kernels", "against L1 kernels"] == ""  # the same pair

    def test_other_epochs_are_not_compared(self, tmp_path):
        record(tmp_path, 91.0, epochs=5)
        record(tmp_path, 90.0, epochs=4, pruning_way="random")
        found = tables.make(tmp_path, "cifar10")["criteria"]
        assert found[["epochs", "criterion"]].values.tolist() == [["4", "random kernels"]]
        record(tmp_path, 90.5, epochs=4)
        found = tables.make(tmp_path, "cifar10")["criteria"].set_index("criterion")
        assert found.loc["B, random survivors", "against random kernels"] == "+0.50 (n=1)"

    def test_conv_by_conv_is_no_criterion(self, tmp_path):
        record(tmp_path, 90.0, epochs=54, pruning_way="random")
        record(tmp_path, 91.0, epochs=1, schedule="layerwise", trained=54)
        found = tables.make(tmp_path, "cifar10")["criteria"]
        assert found["criterion"].tolist() == ["random kernels"]

    def test_the_best_stands_first_at_the_cut_that_was_published(self, tmp_path):
        record(tmp_path, 90.0, pruning_way="random")
        record(tmp_path, 91.0, pruning_way="l1")
        record(tmp_path, 80.0, pruning_way="l1", compress_rate="[0.5]")
        found = tables.make(tmp_path, "cifar10")["criteria"]
        assert found[["published cut %", "criterion"]].values.tolist() == [
            ["53.5", "L1 kernels"],
            ["53.5", "random kernels"],
            ["[0.5]", "L1 kernels"],
        ]

    def test_what_is_not_read_and_another_spelling_make_no_other_criterion(self, tmp_path):
        rates = "[0.0]+[0.4]*7+[0.4]*10+[0.5]*2+[0.6]*16+[0.4]*2+[0.6]*17"
        record(tmp_path, 91.0, pruning_way="l1")
        record(tmp_path, 92.0, pruning_way="l1", survivors="l1", seed=1)
        record(tmp_path, 93.0, pruning_way="l1", compress_rate=rates, seed=2)
        made = tables.make(tmp_path, "cifar10")
        assert made["criteria"]["last epoch"].tolist() == ["92.00 ± 1.00 (n=3)"]
        assert made["overview"].values.tolist() == [["L1 kernels", "92.00 ± 1.00 (n=3)"]]

    def test_another_recipe_is_not_compared(self, tmp_path):
        for way, last in (("random", 90.0), ("l1", 91.0)):
            record(tmp_path, last, pruning_way=way)
        for seed in (0, 1, 2):
            record(tmp_path, 80.0, pruning_way="l1", lr=0.001, distill=0.0, seed=seed)
        found = tables.make(tmp_path, "cifar10")["criteria"]
        assert found["last epoch"].tolist() == ["91.00 (n=1)", "90.00 (n=1)"]

    def test_at_a_glance_the_highest_ranks_stand_first(self, tmp_path):
        assert comparisons.overview(pd.DataFrame()).empty
        for rates, *scores in (("[0.5]", 91, 90, 89), ("[0.7]", 90, 80, None)):
            for way, score in zip(("l1", "random", "bn"), scores, strict=True):
                if score:
                    record(tmp_path, float(score), pruning_way=way, compress_rate=rates, epochs=1)
        record(tmp_path, 92.0, seed=1, pruning_way="l1", compress_rate="[0.5]", epochs=1)
        found = tables.make(tmp_path, "cifar10")["overview"]
        assert list(found) == ["criterion", *(f"ResNet-56, [{r}] %, 1 epoch" for r in (0.5, 0.7))]
        assert found.values.tolist() == [
            ["L1 kernels", "91.50 ± 0.71 (n=2)", "90.00"],
            ["random kernels", "90.00", "80.00"],
            ["lowest-γ filters", "89.00", ""],
        ]


class TestSensitivity:
    def test_one_setting_beside_the_usual(self, tmp_path):
        record(tmp_path, 91.0)
        record(tmp_path, 90.0, groups=5)
        record(tmp_path, 89.0, keep_floor=0.0, epochs=3)
        (one, two) = tables.make(tmp_path, "cifar10")["sensitivity"].to_dict("records")
        assert (one["changed"], one["last epoch"]) == ("groups 5", "90.00 (n=1)")
        assert one["usual setting"] == "91.00 (n=1)"
        assert (two["changed"], two["usual setting"], two["epochs"]) == ("keep_floor 0.0", "", "3")

    def test_mask_seeds_under_one_training_seed_are_a_group_of_their_own(self, tmp_path):
        for seed, last in enumerate((91.0, 91.2, 91.4)):
            record(tmp_path, last, mask_seed=seed)
        assert row(tmp_path)["last epoch"] == "91.00 (n=1)"
        (line,) = tables.make(tmp_path, "cifar10")["sensitivity"].to_dict("records")
        assert line["changed"] == "mask_seed varied"
        assert line["last epoch"] == "91.30 ± 0.14 (n=2)"

    def test_layerwise_stands_beside_as_many_epochs_in_one_go(self, tmp_path):
        record(tmp_path, 92.0, epochs=54)
        slow = {"epochs": 1, "schedule": "layerwise", "trained": 54}
        record(tmp_path, 91.0, **slow)
        record(tmp_path, 91.5, lr=0.01, **slow)
        lines = tables.make(tmp_path, "cifar10")["sensitivity"].to_dict("records")
        assert sorted((line["changed"], line["last epoch"], line["epochs"]) for line in lines) == [
            ("schedule layerwise", "91.00 (n=1)", "54"),
            ("schedule layerwise, lr 0.01", "91.50 (n=1)", "54"),
        ]
        assert all(line["usual setting"] == "92.00 (n=1)" for line in lines)
        assert all(line["before fine-tuning"] == "" for line in lines)

    def test_no_such_run_no_table(self, tmp_path):
        record(tmp_path)
        record(tmp_path, groups=3, validation=100)
        assert "sensitivity" not in tables.make(tmp_path, "cifar10")


def test_the_order_before_and_after_is_a_rank_correlation():
    ranks = {"a": ("10.00", "91.00 (n=1)"), "b": ("20.00", "90.00 (n=1)")}
    ranks |= {"c": ("30.00", "92.00 ± 0.10 (n=2)"), "d": ("40.00", "93.00 (n=1)")}
    rows = [
        {"network": "N", "published cut %": "50", "epochs": "5", "criterion": name,
         "before fine-tuning": before, "last epoch": last}
        for name, (before, last) in ranks.items()
    ]  # fmt: skip
    (line,) = comparisons.order(pd.DataFrame(rows)).to_dict("records")
    # two neighbours change places: 1 - 6 * 2 / (4 * 15)
    assert (line["criteria"], line["rank correlation"]) == ("4", "0.80")
    assert comparisons.order(pd.DataFrame(rows[:3])).empty
    assert comparisons.order(pd.DataFrame()).empty


@pytest.mark.parametrize(
    ("seconds", "hours"), [(-1, ""), (float("nan"), ""), (100, "0.03"), (360, "0.1"), (7200, "2.0")]
)
def test_hours_of_a_few_minutes_are_not_none(seconds, hours):
    assert tables._hours(seconds) == hours
