"""The report: findings, figures and tables as one page, its numbers linked to their records."""

import re
import shutil
from html import escape
from html.parser import HTMLParser

import pytest

from explib.report import conclusions, page, tables
from tests.conftest import ROOT
from tests.report.test_tables import record

PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


class Found(HTMLParser):
    """Addresses, ids and cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.fetched, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [given["href"]] if tag == "a" else []
        self.ids += [given["id"]] if "id" in given else []
        self.fetched += [given[key] for key in ("src", "data", "srcset") if key in given]
        self.fetched += [given["href"]] if tag == "link" else []


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of the committed records, written into a copy of what it links to."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("records", "bench", "tables", "figures"):
        shutil.copytree(ROOT / "results" / name, folder / "results" / name)
    (folder / "explib").symlink_to(ROOT / "explib")
    written = page.build(folder / "results")
    return written, written.read_text()


@pytest.fixture
def own(tmp_path):
    """(results folder, the files of two seeds and one row) of made-up records, with a picture."""
    seeds = [record(tmp_path, last=92 + seed, seed=seed, pruning_way="B") for seed in (0, 1)]
    alone = record(tmp_path, last=91.25, pruning_way="A", name="alone")
    folder = tmp_path / "figures/cifar10"
    folder.mkdir(parents=True)
    (folder / "criteria-resnet_56.svg").write_text(PICTURE)
    return tmp_path, seeds, alone


def test_nothing_is_fetched(committed):
    found = Found(committed[1])
    assert found.fetched and all(source.startswith("data:image/") for source in found.fetched)
    assert not re.search(r"@import|url\(", committed[1])
    assert not [link for link in found.links if "://" in link]


def test_every_link_leads_to_a_file_or_a_place_of_the_page(committed):
    path, text = committed
    found = Found(text)
    assert len(found.ids) == len(set(found.ids))
    for link in set(found.links):
        place = found.ids if link.startswith("#") else None
        assert link[1:] in place if place else (path.parent / link).is_file(), link


def test_contents_name_every_section_in_order(committed):
    listed = re.findall(r'<li><a href="#([^"]+)"', committed[1])
    assert listed == re.findall(r'<section id="([^"]+)"', committed[1]) and len(listed) > 5


def test_findings_and_their_figure_come_before_all_tables(committed):
    text = committed[1]
    assert text.index(escape(conclusions.VERDICT)) < text.index("<dl>") < text.index("<nav")
    assert text.index("<nav") < text.index("<table")
    assert "not measured yet" not in text[: text.index("<nav")]


def test_every_table_and_every_figure_is_there_once(committed):
    path, text = committed
    for name in tables.make(path.parent):
        assert f'<h3 id="{name}">' in text, name
    for picture in (path.parent / "figures/cifar10").glob("*.svg"):
        assert text.count(f'alt="{picture.stem}"') == 1, picture


def test_measured_numbers_of_the_committed_tables_lead_to_records(committed):
    for name in set(tables.make(committed[0].parent)) - {"order"}:
        table = committed[1].split(f'<h3 id="{name}">')[1].split("</table>")[0]
        links = re.findall('href="([^"]+)"', table)
        rows = table.count("<tr>") - 1 - table.count(">not measured yet<")
        assert len(links) >= min(rows, 1) and links, name
        assert all(re.match(r"(records|bench)/|\.\./explib/study/", link) for link in links)


def test_a_number_leads_to_its_record_and_a_mean_to_every_seed(own):
    folder, seeds, alone = own
    text = page.build(folder).read_text()
    table = text.split('<h3 id="as_published">')[1].split("</table>")[0]
    one = re.search(r'<a href="([^"]+)">91.25 \(n=1\)</a>', table)
    assert folder / one[1] == alone
    mean = re.search(r"92.50 ± 0.71 \(n=2\)<small[^>]*>(.*?)</small>", table)[1]
    assert [folder / link for link in re.findall('href="([^"]+)"', mean)] == seeds


def test_elsewhere_the_links_still_lead_to_the_records(own, tmp_path):
    folder, _, alone = own
    there = tmp_path / "a/b/page.html"
    text = page.build(folder, page=there).read_text()
    link = re.search(r'<a href="([^"]+)">91.25 \(n=1\)</a>', text)[1]
    assert (there.parent / link).resolve() == alone.resolve()


def test_columns_that_are_shown_are_those_of_the_tables(committed):
    made = tables.make(committed[0].parent)
    for name, columns in page.SHOWN.items():
        wanted = {column.strip().removesuffix("~") for column in columns.split("|")}
        assert name in made and wanted <= set(made[name]), name


def test_published_stands_beside_measured(committed):
    table = committed[1].split('<h3 id="as_published">')[1].split("</thead>")[0]
    heads = re.findall(r"<th[^>]*>(.*?)</th>", table)
    assert heads.index("last epoch") == heads.index("published top-1") + 1


def test_without_figures_or_records_it_says_what_makes_them(own, tmp_path):
    folder, _, _ = own
    with pytest.raises(FileNotFoundError, match="make tables"):
        page.build(folder, "digits")
    (folder / "figures/digits").mkdir()
    (folder / "figures/digits/criteria-resnet_56.svg").write_text(PICTURE)
    with pytest.raises(ValueError, match=r"digits: no records; `make study`"):
        page.build(folder, "digits")


class TestConclusions:
    def test_numbers_come_from_the_tables(self):
        made = tables.make(ROOT / "results")
        for question, answer in conclusions.answers(made).items():
            assert "{" not in answer and "<!--" not in answer, question
            assert "not measured yet" not in answer, question
        asked = conclusions.CONCLUSIONS["dense"][0]
        public = made["baselines"].set_index("name").loc["resnet_56-public", "last epoch"]
        assert f"ResNet-56 {public} % top-1" in conclusions.answers(made, "dense")[asked]

    def test_what_no_record_gives_says_so(self, tmp_path):
        (answer,) = conclusions.answers(tables.make(tmp_path), "cost").values()
        assert "not measured yet" in answer
        shown = conclusions.show("cost", results_dir=tmp_path).data
        assert shown == f"No record of CIFAR-10 is below `{tmp_path}`."

    def test_a_notebook_shows_those_it_names_with_their_questions(self):
        shown = conclusions.show("dense", "cuts", results_dir=ROOT / "results").data
        assert shown.count("\n- **") == 2 and conclusions.CONCLUSIONS["cuts"][0] in shown
