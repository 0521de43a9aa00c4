"""Writes the tables of README and docs from result files, draws their figures, and finds numbers of no result.

python -m benchmarks.report           writes tables and figures, and lists what is in no result file
python -m benchmarks.report --check   writes nothing, and fails where something would change or is in none

A table stands between the lines `<!--table:NAME-->` and `<!--end-->`. Of the rest of a page every number that looks
measured must be in one of the result files that `SOURCES` names for the page: with a decimal point, a thousands comma,
or a unit behind it. A result is rounded as the page rounds it, and may be in another unit.
"""

import argparse
import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import wire_summary
from .tables import RESULTS, TABLES

Numbers = npt.NDArray[np.float64]
ROOT = Path(__file__).parents[1]
TRAININGS = "papers/trainings"
"""A store of single runs."""
_PAPERS = """
    signmuon verdict_momentum verdict_variants cifar10 densities densities_whole gpt_over_wire gpt_two_sites gpt_keras
    gpt_liars local_steps_gpt local_steps_resnet newcomers quadratic_liars toy_sparse_noise warmup whole_gpt
    whole_resnet zeros_and_ties
"""
PAPERS = tuple(f"papers/{name}" for name in _PAPERS.split())
SOURCES: dict[str, tuple[str, ...]] = {
    "README.md": ("wire", "papers/signmuon", "papers/whole_gpt", "papers/whole_resnet", "demo_digits"),
    "docs/guide/checkpoints.md": ("elastic",),
    "docs/guide/elastic.md": ("elastic_vote", "papers/newcomers", "papers/churn"),
    "docs/guide/faults.md": ("faults", "liars", "papers/quadratic_liars", "papers/gpt_liars"),
    "docs/guide/keras_machines.md": ("keras_wire",),
    "docs/guide/moving.md": ("papers/signmuon", "papers/local_steps_gpt"),
    "docs/guide/nodes.md": ("nodes",),
    "docs/guide/papers.md": PAPERS,
    "docs/guide/performance.md": ("wire", "kernels", "keras_step", "muon_step", "papers/gpt_over_wire", "scaling"),
    "docs/guide/settings.md": (*PAPERS[:4], "papers/whole_gpt", "papers/whole_resnet", TRAININGS, "demo_digits"),
    "docs/guide/sharded.md": ("sharded",),
    "docs/guide/slow_links.md": (
        "papers/signmuon",
        "papers/local_steps_gpt",
        "papers/gpt_two_sites",
        TRAININGS,
        "wire",
    ),
    "docs/guide/start.md": ("demo_digits", "demo_keras_processes", "demo_keras_mirrored", "muon_step"),
    "benchmarks/papers/README.md": (*PAPERS, TRAININGS),
}
"""Page -> result files; those that are not named here have none."""
GIVEN = frozenset({"0.8", "0.9", "0.95", "0.99", "0.999", "0.5", "3.11", "167,000", "0.64", "75,290", "636,000"})
"""Numbers of settings and sizes that look measured."""

_TABLE = re.compile(r"(<!--table:(.+?)-->\n).*?(<!--end-->)", re.DOTALL)
_ASIDE = re.compile(r"```.*?```|<!--.*?-->|`[^`\n]*`|\]\([^)]*\)|\$.*?\$|^#.*?$", re.DOTALL | re.MULTILINE)
"""Code, links and headings, which tell nothing of a measurement."""
_NUMBER = re.compile(
    r"(?<![\w.,/^])(?!\d{4}\.\d{5})(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?!\w|\.\w)(\s?%|\s(?:ms|s|seconds|MB|kB)\b|×)?"
)
_RESULT = re.compile(r"(?<![\w.])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e[-+]?\d+)?")
_SCALES = {"MB": 1e-6, "kB": 1e-3, "s": 1e-3, "seconds": 1e-3, "ms": 1e3, "×": 1.0}
"""Unit of a page -> by what a result in bytes, milliseconds or seconds is multiplied; all others may be shares."""


def fill(text: str) -> str:
    """Return a page with all its tables written anew.

    Raises:
        KeyError: for a table that nothing makes.
    """
    return _TABLE.sub(lambda found: found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3], text)


def strays(page: str, text: str) -> Iterator[str]:
    """Yield the numbers of a page that look measured and are in none of its result files, each with its line's number.

    Args:
        page: its path below the repository.
        text: what it says.
    """
    results = _results(SOURCES.get(page, ()))
    text = _ASIDE.sub(_blank, _TABLE.sub(_blank, text))
    for number, line in enumerate(text.splitlines(), 1):
        for found in _NUMBER.finditer(line):
            whole, fraction, unit = found.groups()
            if (
                (fraction or unit or "," in whole)
                and f"{whole}{fraction or ''}" not in GIVEN
                and not _is_known(whole, fraction, unit, results)
            ):
                yield f"{page}:{number}: {found[0]}"


def _blank(found: "re.Match[str]") -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _is_known(whole: str, fraction: str | None, unit: str | None, results: Numbers) -> bool:
    """Tell whether a result is a page's number, rounded as that is; it may be in another unit."""
    value, half = float(whole.replace(",", "") + (fraction or "")), 0.5 * 10.0 ** -len((fraction or ".")[1:]) + 1e-9
    scales = (1.0, _SCALES.get((unit or "").strip(), 100.0))
    return any(bool((abs(results * scale - value) <= half).any()) for scale in scales)


@functools.cache
def _results(names: tuple[str, ...]) -> Numbers:
    """Return all numbers of some result files."""
    text = "\n".join((RESULTS / f"{name}.txt").read_text() for name in names if name != TRAININGS)
    found = [float(found[0].replace(",", "")) for found in _RESULT.finditer(text)]
    if TRAININGS in names:
        found += _trainings()
    return np.array(found)


def _trainings() -> Iterator[float]:
    """Yield scores and last training losses, then mean and standard deviation of the seeds of a job."""
    seeds = defaultdict[str, list[float]](list)
    for key, (score, curve, *_) in json.loads((RESULTS / f"{TRAININGS}.json").read_text()).items():
        yield from (score, *(loss for _, loss in curve[-1:]))
        seeds[re.sub(r'"seed": \d+', "", key)].append(score)
    for scores in seeds.values():
        if len(scores) > 1:
            yield from (float(np.mean(scores)), float(np.std(scores, ddof=1)))


def draw() -> None:
    """Draw the figures of `wire.json`."""
    cells = json.loads((RESULTS / "wire.json").read_text())["cells"]
    wire_summary.draw(cells, RESULTS / "wire_summary.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is wrong")
    options = parser.parse_args()
    stale, unknown = list[str](), list[str]()
    for path in pages():
        page, text = str(path.relative_to(ROOT)), path.read_text()
        unknown += strays(page, text)
        if (filled := fill(text)) != text:
            stale.append(page)
            if not options.check:
                path.write_text(filled)
    if not options.check:
        draw()
    print("\n".join([f"tables of {', '.join(stale) or 'no page'} were not those of the results", *unknown]))
    print(f"{len(unknown)} numbers of no result")
    raise SystemExit(bool(unknown or (options.check and stale)))


def pages() -> list[Path]:
    """Return README, the guide and the report on the papers."""
    return [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md")), ROOT / "benchmarks/papers/README.md"]


if __name__ == "__main__":
    main()
