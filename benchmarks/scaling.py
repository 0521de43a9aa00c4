"""The cost model beside what wire.py measured, and what it says of up to 4,096 workers and 10¹¹ parameters.

python -m benchmarks.scaling benchmarks/results/wire.json

Few constants are fitted, from few cells: the share of a cable's rate that DDP in fp32 gets on the slowest one, and each
scheme's work per parameter and per message on the fastest. Then all cells are compared, those that were fitted marked.
Cells with a delay are counted apart: the process that holds their packets takes a core's time. A step's compute
is the cell's own step without exchange, its latency half the cell's round trip. What is drawn has one core a worker, as
fast as this machine's, and the tally of a gather does not grow with the workers there, which errs in its favour.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from signsgd_core.network.costs import OURS, SCHEMES, by_nodes, flat

NONE, WITHIN = "no exchange", 0.15
RANKS = 8
"""In a node, for what is drawn."""

Cell = dict[str, Any]


class Constants(NamedTuple):
    """What is fitted: the share of a cable's rate that data gets; scheme -> seconds per parameter, and per message."""

    share: float
    work: dict[str, float]
    message: dict[str, float]
    compute: float = 0.0  # seconds per parameter, for the plot alone


class Row(NamedTuple):
    """One scheme in one cell: seconds, and whether a constant was fitted to it."""

    cell: Cell
    scheme: str
    model: float
    measured: float
    fitted: bool

    @property
    def ratio(self) -> float:
        return self.model / self.measured


def latency(cell: Cell) -> float:
    """Return the seconds that a message takes one way."""
    trip: float = cell.get("round_trip") or cell.get("delay") or 0.0
    return trip / 2


def model(cell: Cell, scheme: str, constants: Constants, cores: int) -> float:
    """Return the seconds that a step should take; all workers share the machine's cores."""
    sizes, compute = (cell["parameters"], cell["workers"]), _measured(cell, NONE)
    own = constants.work.get(scheme, 0.0), cell["workers"] / cores, constants.message.get(scheme, 0.0)
    return flat(scheme, *sizes, latency(cell), compute, *own).seconds(cell["rate"] * constants.share)


def fit(cells: list[Cell], cores: int) -> tuple[Constants, set[tuple[int, str]]]:
    """Return the constants, and to what they were fitted: the numbers of cells, with the schemes.

    A scheme's work is the least-squares fit, of ratios, to what is left of its steps over the fastest cables without a
    delay and the most common number of workers; the share of the rate is what then explains DDP fp32 on the slowest.
    """
    counts = [cell["workers"] for cell in cells]
    usual, fastest = max(set(counts), key=counts.count), max(cell["rate"] for cell in cells)
    quick = [k for k, one in enumerate(cells) if one["workers"] == usual and one["rate"] == fastest]
    nearest = min(latency(cells[k]) for k in quick)
    quick = [k for k in quick if latency(cells[k]) <= 2 * nearest]
    slowest = min(
        range(len(cells)), key=lambda k: (cells[k]["rate"], abs(cells[k]["workers"] - usual), latency(cells[k]))
    )
    constants, used = Constants(1.0, {}, {}), {(slowest, "DDP fp32")} | {(k, name) for k in quick for name in SCHEMES}
    one, whole = cells[slowest], _measured(cells[slowest], "DDP fp32")
    for _ in range(20):  # each needs the other, little
        fitted = {name: _work([cells[k] for k in quick], name, constants.share, cores) for name in SCHEMES}
        work, message = ({name: pair[i] for name, pair in fitted.items()} for i in (0, 1))
        rest, full = (model(one, "DDP fp32", Constants(share, work, message), cores) for share in (float("inf"), 1.0))
        constants = Constants((full - rest) / (whole - rest), work, message)
    return constants._replace(
        compute=_slope([(_load(cells[k], cores), _measured(cells[k], NONE)) for k in quick])
    ), used


def _work(cells: list[Cell], scheme: str, share: float, cores: int) -> tuple[float, float]:
    """Return the seconds per parameter and per message that explain what is left of a scheme's steps."""
    times = np.array([_measured(cell, scheme) for cell in cells])
    bare = np.array([model(cell, scheme, Constants(share, {}, {}), cores) for cell in cells])
    units = [({scheme: 1.0}, {}), ({}, {scheme: 1.0})]
    columns = [[model(cell, scheme, Constants(share, *unit), cores) for cell in cells] - bare for unit in units]
    found = np.linalg.lstsq((np.array(columns) / times).T, 1 - bare / times, rcond=None)[0]
    return float(found[0]), float(found[1])


def _load(cell: Cell, cores: int) -> float:
    """Return the parameters that a core has to work on."""
    return float(max(1.0, cell["workers"] / cores) * cell["parameters"])


def _measured(cell: Cell, scheme: str) -> float:
    return float(cell["schemes"][scheme]["seconds"])


def _slope(pairs: list[tuple[float, float]]) -> float:
    """Return the least-squares slope through the origin."""
    x, y = np.array(pairs).T
    return float(x @ y / (x @ x))


def compare(cells: list[Cell], cores: int) -> tuple[Constants, list[Row]]:
    """Return the constants, and every scheme in every cell."""
    constants, used = fit(cells, cores)
    rows = [
        Row(cell, name, model(cell, name, constants, cores), _measured(cell, name), (k, name) in used)
        for k, cell in enumerate(cells)
        for name in SCHEMES
    ]
    return constants, rows


def title(cell: Cell) -> str:
    trip = f"{2e3 * latency(cell):.1f} ms"
    return f"{cell['rate'] / 1e6:,.0f} Mbit/s, {trip}, M = {cell['workers']}, {cell['parameters'] / 1e6:.0f} million"


def table(constants: Constants, rows: list[Row]) -> Iterator[str]:
    """Return the lines: constants, model by measured, and how many are near."""
    yield f"share of a cable's rate: {constants.share:.3f}; work of one worker alone on a core, ns per parameter and"
    yield "microseconds per message: " + "; ".join(
        f"{_short(name)} {1e9 * constants.work[name]:.1f}, {1e6 * constants.message[name]:.0f}" for name in SCHEMES
    )
    yield f"\n{'model / measured; * fitted':<46}" + "".join(f"{_short(name):>10}" for name in SCHEMES)
    for k in range(0, len(rows), len(SCHEMES)):
        line = rows[k : k + len(SCHEMES)]
        yield f"{title(line[0].cell):<46}" + "".join(f"{row.ratio:>9.2f}{' *'[row.fitted]}" for row in line)
    tested = [row for row in rows if not row.fitted]
    direct, delayed = ([row for row in tested if bool(row.cell["delay"]) == late] for late in (False, True))
    for name, some in (("all", rows), ("not fitted, no delay", direct), ("not fitted, a delay added", delayed)):
        if some:
            near = sum(abs(row.ratio - 1) <= WITHIN for row in some)
            worst = max(some, key=lambda row: abs(np.log(row.ratio)))
            yield (
                f"{name}: {near} of {len(some)} within {WITHIN:.0%} ({near / len(some):.0%}); worst {worst.ratio:.2f}: "
                + (f"{worst.scheme}, {title(worst.cell)}")
            )
    ours = [row for row in rows if row.scheme == OURS]
    yield f"ours, all: {sum(abs(row.ratio - 1) <= WITHIN for row in ours)} of {len(ours)} within {WITHIN:.0%}"


def _short(name: str) -> str:
    return {OURS: "ours", "1-bit all-gather": "gather"}.get(
        name, name.replace("PowerSGD rank ", "rank ").replace(" hook", "")
    )


def draw(constants: Constants, options: argparse.Namespace, path: Path) -> None:
    """Save a step's seconds against workers and against parameters, flat and by nodes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    many = [RANKS * 2**k for k in range(1, 10)]  # 16 to 4,096
    sizes = [10**k for k in range(6, 12)]
    link, inner = options.node_link * constants.share, options.inner_link
    for name in SCHEMES:
        work, wide = constants.work[name], 2.5 if name == OURS else 1.2

        def alone(d: int, m: int, name: str = name, work: float = work) -> float:
            return flat(
                name, d, m, options.latency, constants.compute * d, work, per_message=options.per_message
            ).seconds(link / RANKS if name == OURS else link)  # a ring in the nodes' order leaves a node once

        def nodes(d: int, m: int, name: str = name, work: float = work) -> float:
            ways = (inner, options.latency, options.inner_latency)
            cost = by_nodes(name, d, m // RANKS, RANKS, *ways, constants.compute * d, work, options.per_message)
            return cost.seconds(link)

        for column, of in enumerate((alone, nodes)):
            panels[0][column].plot(many, [of(10**9, m) for m in many], label=name, linewidth=wide)
            panels[1][column].plot(sizes, [of(d, 1024) for d in sizes], label=name, linewidth=wide)
    for column, way in enumerate(("flat", f"by nodes of {RANKS} ranks")):
        panels[0][column].set(title=f"10⁹ parameters, {way}", xlabel="workers")
        panels[1][column].set(title=f"1,024 workers, {way}", xlabel="parameters")
    for axes in panels.flat:
        axes.set(xscale="log", yscale="log", ylabel="seconds a step")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(
        f"model: {options.node_link / 1e9:g} Gbit/s a node, {inner / 1e9:g} Gbit/s a rank inside", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wire", type=Path, help="wire.json, as benchmarks/wire.py saves it")
    parser.add_argument(
        "--cores", type=int, default=2, help="of the machine that wire.json is of (default: %(default)s)"
    )
    parser.add_argument("--node-link", type=float, default=1e10, help="bit/s, for the plot (default: %(default)s)")
    parser.add_argument("--inner-link", type=float, default=1e11, help="bit/s of a rank inside its node, for the plot")
    parser.add_argument("--latency", type=float, default=2e-5, help="seconds one way, for the plot")
    parser.add_argument("--inner-latency", type=float, default=5e-6, help="seconds one way inside a node, for the plot")
    parser.add_argument("--per-message", type=float, default=1e-5, help="seconds of software, for the plot")
    parser.add_argument("--out", type=Path, help="folder for scaling.txt and scaling.png")
    options = parser.parse_args()
    if not options.wire.is_file():
        parser.error(
            f"argument wire: no file {str(options.wire)!r}: make one by python -m benchmarks.wire --out FOLDER"
        )
    found = json.loads(options.wire.read_text())
    constants, rows = compare(found["cells"], options.cores)
    said = [
        f"measured on: {found['machine']}; {options.cores} cores taken as shared by all workers",
        f"by: {found['command']}",
        " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
        "",
        *table(constants, rows),
    ]
    print("\n".join(said))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scaling.txt").write_text("\n".join(said) + "\n")
        draw(constants, options, options.out / "scaling.png")


if __name__ == "__main__":
    main()
