"""What a step costs under each way to exchange gradients, over cables of 100 Mbit/s, 1 Gbit/s and 10 Gbit/s.

python -m benchmarks.wire

Real worker processes over Gloo, each in a network namespace of its own, all on one switch; a token bucket limits each
cable in both directions, and for a longer way the switch holds what goes through it. All workers share the machine's
cores. All ways run in the same processes, in turn, so that a busy machine slows all of them. Bytes are what a worker's
interface counted; the segments of one large packet share a header there. It takes root and iproute2.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from benchmarks.network import Network, available
from benchmarks.wire_worker import NONE, OURS, ROUNDS, SLOW, SLOW_ROUNDS
from signsgd_core.network.traffic import majority_vote

ROOT = Path(__file__).parents[1]
LIMIT = 900
"""Seconds for one cell."""

Row = dict[str, dict[str, float]]


class Cell(NamedTuple):
    """A network, and what is trained over it."""

    mbits: int  # Mbit/s of a cable
    delay: float  # ms that the switch adds to a round trip
    workers: int
    millions: float  # of parameters
    two_sites: bool = False  # half of the machines each, and the cable is between them

    def network(self) -> str:
        added = f", {self.delay:g} ms round trip added" if self.delay else ""
        added += " between two sites" if self.two_sites else ""
        return f"{self.mbits:,} Mbit/s{added}, M = {self.workers}"

    def title(self) -> str:
        return f"{self.network()}, {self.millions:g} million parameters"


CELLS = [
    *itertools.starmap(Cell, itertools.product((100, 1_000, 10_000), (0,), (4,), (10, 1, 25))),
    *itertools.starmap(Cell, itertools.product((100, 1_000), (1, 20), (4,), (10,))),
    *itertools.starmap(Cell, itertools.product((100, 1_000, 10_000), (0,), (2, 8), (10,))),
    Cell(50, 40, 4, 10, two_sites=True),
]
"""What is run where nothing is chosen."""


def launch(cell: Cell, batch_size: int, device: str) -> dict[str, Any]:
    """Run all workers of a cell and return what they found."""
    module = ["benchmarks.wire_worker", "--parameters", str(round(cell.millions * 1e6))]
    return work(cell, [*module, "--batch-size", str(batch_size), "--device", device], cell.title(), LIMIT)


def work(cell: Cell, module: Sequence[str], title: str, limit: float) -> dict[str, Any]:
    """Run a module on every machine of a network and return what rank 0 wrote down.

    Args:
        cell: the network.
        module: its name and arguments; it is also given --rank, --workers, --master, --found and --title.
        title: for messages.
        limit: seconds after which it is too late.
    """
    with (
        Network(cell.workers, cell.mbits * 1e6, cell.delay / 2e3, cell.two_sites) as network,
        tempfile.TemporaryDirectory() as folder,
    ):
        found, running = Path(folder) / "found.json", list[subprocess.Popen[bytes]]()
        command = [sys.executable, "-m", *module, "--workers", str(cell.workers), "--found", str(found)]
        command += ["--master", network.address(0), "--title", title]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": network.interface}
        try:
            for rank in range(cell.workers):
                line = network.command(rank, *command, "--rank", str(rank))
                running.append(subprocess.Popen(line, cwd=ROOT, env=environment))
            deadline = time.monotonic() + limit
            while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{title}: not done within {limit} s")
                time.sleep(0.1)
        finally:
            for one in running:
                one.kill()
                one.wait()
        if not found.exists():
            codes = [one.returncode for one in running]
            raise RuntimeError(f"{title}: a worker failed, exit codes {codes}; see above")
        return dict(json.loads(found.read_text()))


def table(cell: Cell, found: dict[str, Any]) -> str:
    """Return the lines of one cell; the floor is a step without exchange and the vote's bytes at full rate."""
    rows: Row = found["schemes"]
    alone, formula = rows[NONE]["seconds"], majority_vote(found["parameters"], cell.workers)
    floor = alone + 8 * formula / (cell.mbits * 1e6)
    lines = [f"{cell.title()}; round trip {1e3 * found['round_trip']:.2f} ms, floor {1e3 * floor:.0f} ms"]
    lines.append(f"{'':<28}{'ms':>9}{'/alone':>9}{'/floor':>9}{'ours/it':>9}{'MB sent':>10}")
    for name, row in rows.items():
        took, ours = row["seconds"], rows[OURS]["seconds"]
        lines.append(
            f"{name:<28}{1e3 * took:>9.0f}{took / alone:>9.2f}{took / floor:>9.2f}{ours / took:>9.3f}"
            f"{row['bytes'] / 1e6:>10.3f}"
        )
    lines.append(f"ours sent {rows[OURS]['bytes'] / formula:.4f} of the formula's {formula:,} bytes")
    return "\n".join(lines)


def draw(found: Sequence[tuple[Cell, dict[str, Any]]], path: Path) -> None:
    """Save a panel a cell, each step's time beside the one without exchange."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 2.6 * lines), sharey=True, layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (cell, one) in zip(panels.flat, found, strict=False):
        rows: Row = one["schemes"]
        colours = ["tab:orange" if name == OURS else "tab:blue" for name in rows]
        axes.barh(list(rows), [row["seconds"] * 1e3 for row in rows.values()], color=colours)
        axes.axvline(rows[NONE]["seconds"] * 1e3, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(cell.title(), fontsize=8)
        axes.set_xlabel("ms a step")
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=110)


def save(said: list[str], found: list[tuple[Cell, dict[str, Any]]], out: Path) -> None:
    """Write what was found so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "wire.txt").write_text("\n".join(said) + "\n")
    cells = [
        {"rate": cell.mbits * 1e6, "delay": cell.delay / 1e3, "workers": cell.workers, **one} for cell, one in found
    ]
    document = {"machine": said[0], "command": said[1], "cells": cells}
    (out / "wire.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(found, out / "wire.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbits", nargs="+", type=int, help="Mbit/s of a cable; with the next ones, their product")
    parser.add_argument("--delays", nargs="+", type=float, default=[0.0], help="ms added to a round trip")
    parser.add_argument("--workers", nargs="+", type=int, default=[4])
    parser.add_argument("--millions", nargs="+", type=float, default=[10.0], help="of parameters")
    parser.add_argument("--two-sites", action="store_true", help="the cable is between two halves of the machines")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="where to train: cuda puts all workers on one GPU")
    parser.add_argument("--out", type=Path, help="folder for wire.txt, wire.json and wire.png")
    options = parser.parse_args()
    if not available():
        sys.exit("benchmarks/wire.py makes network namespaces: run it as root, with iproute2 installed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go, too
    product = itertools.product(options.mbits or (), options.delays, options.workers, options.millions)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    said = [
        f"{machine()}, TCP congestion control {control}",
        f"{' '.join(['python', '-m', 'benchmarks.wire', *sys.argv[1:]])}: batch {options.batch_size}, one thread a "
        f"worker; the slowest worker's step, median of {ROUNDS} rounds ({SLOW_ROUNDS} of a step over {SLOW:g} s)",
    ]
    print("\n".join(said))
    found = []
    for cell in [Cell(*one, options.two_sites) for one in product] or CELLS:
        found.append((cell, launch(cell, options.batch_size, options.device)))
        said.append("\n" + table(*found[-1]))
        print(said[-1], flush=True)
        if options.out:
            save(said, found, options.out)


if __name__ == "__main__":
    main()
