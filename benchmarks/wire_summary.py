"""The figure of the README: what each scheme adds to a step, by link rate and by round trip.

`python -m benchmarks.report` draws it from what `benchmarks.wire` measured, `results/wire.json`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.wire_worker import NONE, OURS

WORKERS, PARAMETERS = 4, 10_010_000
RATE = 1e9
"""Of the links in the panel of round trips, in bit/s."""

LINES = {
    "DDP fp32": ("DDP, fp32", "tab:blue", "o"),
    "DDP fp16 hook": ("DDP, fp16 hook", "tab:cyan", "s"),
    "PowerSGD rank 1": ("PowerSGD, rank 1", "tab:green", "^"),
    "1-bit all-gather": ("signs in one all-gather", "tab:gray", "v"),
    OURS: ("majority vote", "tab:orange", "D"),
    "ours, local steps, H = 16": ("local steps, H = 16", "tab:red", "P"),
}
"""Scheme -> label, colour, marker."""


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Save two panels: step time over a step without exchange, against link rate and against round trip.

    Args:
        cells: of `wire.json`.
        path: of the image.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    chosen = [cell for cell in cells if cell["workers"] == WORKERS and cell["parameters"] == PARAMETERS]
    near = sorted((cell for cell in chosen if cell["delay"] == 0), key=lambda cell: cell["rate"])
    far = sorted((cell for cell in chosen if cell["rate"] == RATE), key=lambda cell: cell["round_trip"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.6, 3.9), sharey=True, layout="constrained")
    for axes, row, labels, title in (
        (left, near, [_rate(cell["rate"]) for cell in near], "By link rate; round trip 0.2 ms"),
        (right, far, [f"{1e3 * cell['round_trip']:.2g} ms" for cell in far], "By round trip; link rate 1 Gbit/s"),
    ):
        for name, (label, colour, marker) in LINES.items():
            ratios = [cell["schemes"][name]["seconds"] / cell["schemes"][NONE]["seconds"] for cell in row]
            width = 3.0 if name == OURS else 1.5
            axes.plot(labels, ratios, color=colour, marker=marker, linewidth=width, label=label, zorder=2 + width)
        axes.axhline(1, color="black", linewidth=1, linestyle="--", label="no exchange")
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    left.set_ylabel("step time ÷ step without exchange")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _rate(bits: float) -> str:
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"
