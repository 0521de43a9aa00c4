"""Given gradients, and what a monitor must say of the votes on them, counted on plain ballots."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from signsgd_core import Zeros

Array = npt.NDArray[Any]
SIZES = (70, 3, 130)
STEPS = 6
Figures = dict[str, float]


def given_gradients(ranks: int, steps: int = STEPS, sizes: Sequence[int] = SIZES) -> list[list[list[Array | None]]]:
    """Eighths, zeros often; one of 40 entries is NaN, Inf or −Inf."""
    random = np.random.default_rng(ranks)
    values = random.integers(-2, 3, (steps, ranks, sum(sizes))) / 8
    wild = random.choice([np.nan, np.inf, -np.inf], values.shape)
    values = np.where(random.random(values.shape) < 1 / 40, wild, values).astype(np.float32)
    return [[list(np.split(worker, np.cumsum(sizes)[:-1])) for worker in step] for step in values]


def expected_figures(given: Sequence[Any], zeros: Zeros, every: int) -> list[Figures]:
    """Count the plain ballots of signSGD, `every` steps at a time."""
    rows: list[Figures] = []
    nonfinite, last = 0, None
    for first in range(0, len(given), every):
        agreed, tied, flipped = [], [], list[Any]()
        for t in range(first, first + every):
            g = np.stack([np.concatenate(worker) for worker in given[t]])
            nonfinite += int((~np.isfinite(g)).sum())
            signs = np.sign(np.where(np.isfinite(g), g, 0))
            zero = {"alternate": [(-1) ** (t + i) for i in range(len(g))], "abstain": [0], "positive": [1]}[zeros]
            ballots = np.where(signs == 0, np.array(zero)[:, None], signs)
            tally = ballots.sum(axis=0)
            verdict = np.where(tally == 0, zero[0], np.sign(tally))
            agreed.append((ballots == verdict).mean(axis=1))
            tied.append((tally == 0).mean())
            flipped += [] if last is None else [(verdict != last).mean()]
            last = verdict
        figures = {f"vote/agreement/rank{rank}": share for rank, share in enumerate(np.mean(agreed, axis=0))}
        figures |= {"vote/flips": np.mean(flipped)} if flipped else {}
        rows.append({**figures, "vote/ties": np.mean(tied), "vote/nonfinite": nonfinite})
    return rows


def set_bucket_size(optimizer: Any, bucket_size: int) -> None:
    """Let ballots travel in smaller buckets, so that a small model takes several."""
    optimizer.vote.options = replace(optimizer.vote.options, bucket_size=bucket_size)
