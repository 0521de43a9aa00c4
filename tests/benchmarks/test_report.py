"""README and docs say what the result files say."""

import json
import re

import pytest

from benchmarks import report, scaling, tables

PAGES = {str(path.relative_to(report.ROOT)): path.read_text() for path in report.pages()}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page: str) -> None:
    assert report.fill(PAGES[page]) == PAGES[page], "run python -m benchmarks.report"


@pytest.mark.parametrize("page", PAGES)
def test_no_number_without_a_result(page: str) -> None:
    assert list(report.strays(page, PAGES[page])) == []


def test_every_table_is_shown() -> None:
    shown = {name for text in PAGES.values() for name in re.findall("<!--table:(.+?)-->", text)}
    assert shown == set(tables.TABLES)


def test_a_table_is_written_anew() -> None:
    old = "above\n<!--table:nodes-->\n| 1 |\n<!--end-->\nbelow\n"
    new = report.fill(old)
    assert new.startswith("above\n<!--table:nodes-->\n| milliseconds a step |")
    assert new.endswith("|\n<!--end-->\nbelow\n")
    with pytest.raises(KeyError, match="nothing"):
        report.fill(old.replace("nodes", "nothing"))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a step took 5,353 ms, as the file says", []),
        ("5.4 seconds, rounded and in another unit", []),
        ("a step took 5,354 ms", ["5,354 ms"]),
        ("16.85 and 17 times, and 16.7", ["16.7"]),
        ("numbers such as 4 workers, `0.123`, [](0.123) and 2018 are none of a result", []),
        ("$0.123$, 1802.04434 and β = 0.9", []),
    ],
)
def test_a_number_without_a_result_is_found(line: str, found: list[str]) -> None:
    assert list(report.strays("docs/guide/nodes.md", f"above\n{line}")) == [
        f"docs/guide/nodes.md:2: {number}" for number in found
    ]


def test_the_cost_model_is_of_the_wire_as_it_was_last_measured() -> None:
    cells = json.loads((tables.RESULTS / "wire.json").read_text())["cells"]
    said = (tables.RESULTS / "scaling.txt").read_text()
    again = "python -m benchmarks.scaling benchmarks/results/wire.json --out benchmarks/results"
    assert said.endswith("\n".join(scaling.table(*scaling.compare(cells, cores=2))) + "\n"), f"run {again}"


def test_a_page_without_results_has_no_figures() -> None:
    assert list(report.strays("docs/guide/another.md", "It took 12.5 s.")) == ["docs/guide/another.md:1: 12.5 s"]
