"""The tables of README and docs, each made from a result file."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SCHEMES = {
    "no exchange": "no exchange",
    "DDP fp32": "DDP, fp32",
    "DDP fp16 hook": "DDP, fp16 hook",
    "PowerSGD rank 1": "PowerSGD, rank 1",
    "PowerSGD rank 4": "PowerSGD, rank 4",
    "1-bit all-gather": "signs in one all-gather",
    "majority vote (ours)": "**majority vote**",
    "ours, overlap=True": "with `overlap=True`",
    "fp32 mean, H = 16": "fp32 mean every 16 steps",
    "ours, local steps, H = 4": "local steps, `sync_every=4`",
    "ours, local steps, H = 16": "**local steps, `sync_every=16`**",
    "ours, local steps, H = 64": "local steps, `sync_every=64`",
}
"""What `benchmarks.wire` calls a scheme -> what a table does."""
FEW = ("no exchange", "DDP fp32", "PowerSGD rank 1", "majority vote (ours)", "ours, local steps, H = 16")
METHODS = {
    "**SignMuon, vote**": ("SignMuon",),
    "Muon, fp32": ("Muon, clipped",),
    "AdamW, fp32, the better β2": ("AdamW, clipped", "AdamW .95, clipped"),
    "verdict momentum, vote": ("verdict momentum 0.8",),
}
"""What a table calls a method -> what `benchmarks.papers.signmuon` does; of several the best."""
EVERY_STEP = {
    "AdamW, clipped": "AdamW over DDP, every step",
    "Muon, clipped": "Muon over DDP, every step",
    "SignMuon": "SignMuon's vote, every step",
}
"""What `benchmarks.papers.signmuon` calls a row -> what the table beside local steps does."""
INNER = {
    "Muon, clipped, vote": "**local steps, `sync_every={}`**",
    "Muon, clipped, mean": "fp32 mean every {} steps",
    "Muon, clipped, DiLoCo": "DiLoCo every {} steps",
    "AdamW .95, clipped, vote": "local steps, `sync_every={}`, AdamW inside",
    "AdamW .95, clipped, mean": "fp32 mean every {} steps, AdamW inside",
    "AdamW .95, clipped, DiLoCo": "DiLoCo every {} steps, AdamW inside",
}
"""What `benchmarks.papers.local_steps` calls a row -> what a table does, given `H`."""

WHOLE = {
    "SignMuon": "**SignMuon, vote**",
    "Muon, clipped": "Muon, fp32",
    "AdamW, clipped": "AdamW, fp32",
    "SGD, Nesterov": "SGD with Nesterov's momentum, fp32",
    "Lion, clipped": "Lion, fp32",
    "Signum": "Signum, vote",
    "verdict momentum 0.8": "verdict momentum 0.8, vote",
    "Muon, clipped, vote every 16": "**local steps**, `sync_every=16`, Muon inside",
}
"""What `benchmarks.papers.whole` calls a row, and `signmuon` a vote -> what a table does."""


KERAS = {
    "SignMuon": "**SignMuon, vote**",
    "Muon, clipped": "Keras' Muon, fp32",
    "AdamW, clipped": "Keras' AdamW, fp32",
    "Signum": "Signum, vote",
}
"""What `benchmarks.papers.gpt_keras` calls a row -> what a table does."""


LIARS = {
    "SignMuon, vote": "**SignMuon, vote**",
    "Signum, vote": "Signum, vote",
    "AdamW .95, clipped": "AdamW, mean of gradients, fp32",
    "AdamW .95, median, clipped": "AdamW, median of each coordinate, fp32",
}
"""What `benchmarks.papers.gpt_liars` calls a row -> what a table does."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def text_rows(name: str, section: str = "") -> list[list[str]]:
    """Return the rows of a result file, cell by cell.

    Args:
        name: of the file, without ending.
        section: text of the line that the rows stand below, as far as the next empty line; none for the first line.

    Raises:
        ValueError: if no line has that text.
    """
    lines = (RESULTS / f"{name}.txt").read_text().splitlines()
    first = next((k for k, line in enumerate(lines) if section in line), None)
    if first is None:
        raise ValueError(f"results/{name}.txt has no line with {section!r}")
    below = itertools.takewhile(str.strip, lines[first + 1 :])
    return [re.split(r"\s{2,}", line.strip()) for line in below]


def wire(columns: Mapping[str, tuple[float, float]], schemes: Sequence[str], corner: str = "") -> list[str]:
    """Return milliseconds a step of four workers and ten million parameters, and the bytes of the first column.

    Args:
        columns: title -> link rate in bit/s, delay in seconds.
        schemes: of `SCHEMES`.
        corner: the first column's title.
    """
    cells = json.loads((RESULTS / "wire.json").read_text())["cells"]
    chosen = [_cell(cells, *place)["schemes"] for place in columns.values()]
    best = [min(cell[name]["seconds"] for name in schemes if name != "no exchange") for cell in chosen]
    rows = []
    for name in schemes:
        seconds = [cell[name]["seconds"] for cell in chosen]
        shown = [_bold(f"{1e3 * s:,.0f}", s == least) for s, least in zip(seconds, best, strict=True)]
        sent = chosen[0][name]["bytes"] / 1e6
        rows.append([SCHEMES[name], *shown, f"{sent:.{1 if sent >= 0.1 else 2}f}" if sent > 0.01 else "0"])
    return markdown([corner, *columns, "MB sent by each"], rows)


def learning() -> list[str]:
    """Return what `benchmarks.papers` measured of both tasks, three seeds each."""
    gpt, resnet = (_first(text_rows("papers/signmuon", task)) for task in ("GPT on bytes", "ResNet on images"))
    head = [
        "",
        "bits a parameter",
        "GPT, 0.64 M, 500 steps: loss",
        "bits a parameter",
        "ResNet-8, an epoch of CIFAR-10",
    ]
    rows = []
    for label, methods in METHODS.items():
        loss_bits, *loss, _ = min((gpt[method][-4:] for method in methods), key=lambda cells: float(cells[1]))
        bits, *score, _ = max((resnet[method][-4:] for method in methods), key=lambda cells: float(cells[1]))
        rows.append([label, loss_bits, _mean(loss), bits, f"{_mean(score, 100, 1)}%"])
    local_gpt = text_rows("papers/local_steps_gpt", "GPT on bytes")
    local_resnet = text_rows("papers/local_steps_resnet", "ResNet on images")
    for every in (4, 16):
        loss_bits, *loss = _local(local_gpt, every)
        bits, *score = _local(local_resnet, every)
        label = f"**local steps**, `sync_every={every}`, Muon inside"
        rows.append([label, loss_bits, _mean(loss), bits, f"{_mean(score, 100, 1)}%"])
    return markdown(head, rows)


def workers() -> list[str]:
    """Return the scores of the votes by number of workers: with four the mean of three seeds, else one seed."""
    votes = ("SignMuon", "verdict momentum 0.8", "Signum")
    rows = []
    for task, title, format_ in (("GPT on bytes", "GPT, loss", ".3f"), ("ResNet on images", "ResNet, accuracy", ".1%")):
        cells = text_rows("papers/signmuon", task)
        scores = {(row[0], row[2]): row[1] for row in cells if row[-1].endswith(" workers")}
        scores |= {(name, "4 workers"): row[-3] for name, row in _first(cells).items() if name in votes}
        for name in votes:
            own = [format(float(scores[name, f"{count} workers"]), format_) for count in (1, 3, 4, 8)]
            rows.append([f"{title}: {WHOLE[name]}", *own])
    return markdown(["workers", "1", "3", "4", "8"], rows)


def local_steps() -> list[str]:
    """Return what `benchmarks.papers` measured of the GPT, with Muon inside or AdamW, three seeds each."""
    every_step = _first(text_rows("papers/signmuon", "GPT on bytes"))
    rows = [[label, every_step[name][-4], _mean(every_step[name][-3:-1])] for name, label in EVERY_STEP.items()]
    local = text_rows("papers/local_steps_gpt", "GPT on bytes")
    rows += [[INNER[r[0]].format(r[1]), r[-3], _mean(r[-2:])] for r in local if r[0] in INNER and r[-1] != "-"]
    return markdown(["", "bits a parameter, whole run", "loss"], rows)


def whole(kind: str, score: str, shown: str, highest: bool) -> list[str]:
    """Return what `benchmarks.papers.whole` measured of a task, from the best score to the worst.

    Args:
        kind: of the task.
        score: what it is, for the head.
        shown: its format.
        highest: whether the highest score is the best.
    """
    _, *lines = text_rows(f"papers/whole_{kind}", " steps of ")
    lines.sort(key=lambda cells: float(cells[6]), reverse=highest)
    rows = [[WHOLE[c[0]], c[3], format(float(c[6]), shown), f"{float(c[8]):.3f}"] for c in lines]
    rows[0][2] = _bold(rows[0][2], True)
    return markdown(["", "bits a parameter", score, "training loss"], rows)


def keras() -> list[str]:
    """Return what `benchmarks.papers.gpt_keras` measured, three seeds each, from the best loss to the worst."""
    rows = [row for row in text_rows("papers/gpt_keras", " steps of ") if row[0] in KERAS]
    rows.sort(key=lambda row: float(row[-2]))
    cells = [[KERAS[row[0]], _mean(row[-2:])] for row in rows]
    cells[0][1] = _bold(cells[0][1], True)
    return markdown(["", "validation loss"], cells)


def liars() -> list[str]:
    """Return what `benchmarks.papers.gpt_liars` measured, three seeds each."""
    _, *lines = text_rows("papers/gpt_liars", "GPT on bytes")
    rows = [[LIARS[name], *cells] for name, *cells in lines if name in LIARS]
    for column in range(1, len(rows[0])):
        best = min(rows, key=lambda row: float(row[column].split()[0]))
        best[column] = _bold(best[column], True)
    return markdown(["of 7 workers send the opposite", "none", "1", "2", "3"], rows)


def churn() -> list[str]:
    """Return what `benchmarks.papers.churn` measured, but for the accuracy."""
    head, *rows = text_rows("papers/churn", "digits, perceptron")
    return markdown(["", *head[:-1]], [row[:-1] for row in rows if len(row) == 1 + len(head)])


def newcomers() -> list[str]:
    """Return what `benchmarks.papers.newcomers` measured."""
    (head, *paces), *rows = text_rows("papers/newcomers", "GPT on bytes")
    return markdown([head, *paces], [row for row in rows if len(row) == 1 + len(paces)])


def nodes() -> list[str]:
    """Return what `benchmarks.nodes` measured."""
    slow, fast = (_first(text_rows("nodes", f"{rate} Mbit/s between")) for rate in ("100", "1,000"))
    names = ("no exchange", "DDP fp32", "vote between ranks", "vote between nodes")
    least = [min((rows[name][0] for name in names[1:]), key=float) for rows in (slow, fast)]
    rows = [
        [
            SCHEMES.get(name, name),
            *(
                _bold(f"{int(rows[name][0]):,}", rows[name][0] == best)
                for rows, best in zip((slow, fast), least, strict=True)
            ),
            "0" if name == names[0] else f"{float(slow[name][2]):.1f}",
        ]
        for name in names
    ]
    return markdown(["milliseconds a step", "100 Mbit/s", "1 Gbit/s", "MB sent by a node"], rows)


def _local(rows: Sequence[Sequence[str]], every: int) -> Sequence[str]:
    """Return bits, mean and spread of a vote every so many steps with Muon inside."""
    return next(row[-3:] for row in rows if row[:2] == ["Muon, clipped, vote", str(every)])


def _first(rows: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    """Return rows by their first cells; of several with the same one the first."""
    return {label: cells for label, *cells in reversed(rows)}


def _cell(cells: Sequence[dict[str, Any]], rate: float, delay: float) -> dict[str, Any]:
    """Return the cell of four workers and ten million parameters."""
    wanted = {"rate": rate, "delay": delay, "workers": 4, "parameters": 10_010_000}
    return next(cell for cell in cells if all(cell[key] == value for key, value in wanted.items()))


def _mean(cells: Sequence[str], factor: float = 1, digits: int = 3) -> str:
    """Return a mean and a standard deviation as they are shown."""
    mean, spread = (factor * float(cell) for cell in cells)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


LOCAL = (*FEW[:-1], *(name for name in SCHEMES if "H = " in name))
RATES = {"100 Mbit/s": (1e8, 0.0), "1 Gbit/s": (1e9, 0.0), "10 Gbit/s": (1e10, 0.0)}
SLOW = {"100 Mbit/s": (1e8, 0.0), "100 Mbit/s, 20 ms round trip": (1e8, 0.02), "1 Gbit/s": (1e9, 0.0)}
TABLES: dict[str, Callable[[], list[str]]] = {
    "wire": lambda: wire(RATES, FEW),
    "wire, all schemes": lambda: wire({**RATES, "1 Gbit/s, 20 ms round trip": (1e9, 0.02)}, list(SCHEMES), "4 workers"),
    "wire, local steps": lambda: wire(SLOW, LOCAL),
    "learning": learning,
    "workers": workers,
    "local steps": local_steps,
    "whole": lambda: whole("gpt", "validation loss", ".3f", highest=False),
    "whole, images": lambda: whole("resnet", "test accuracy", ".1%", highest=True),
    "keras": keras,
    "liars": liars,
    "newcomers": newcomers,
    "churn": churn,
    "nodes": nodes,
}
"""Name in a page -> what makes the table."""
