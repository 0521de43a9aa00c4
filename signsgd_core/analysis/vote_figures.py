"""What the counts of votes come to: the figures that the monitors of all front ends log, under one set of names.

| name | meaning | unit |
|---|---|---|
| ``vote/agreement/rank{r}`` | share of coordinates where worker r's ballot was the verdict | 0 to 1 |
| ``vote/ties`` | share of coordinates with a tied tally | 0 to 1 |
| ``vote/flips`` | share of coordinates whose verdict was not that of the step before | 0 to 1 |
| ``vote/bytes_per_step`` | payload that a worker sent per step, the mean of all | bytes |
| ``vote/exchange_seconds`` | time a worker waited for others per step, the mean of all | seconds |
| ``vote/nonfinite`` | gradient entries that were NaN or ±Inf since the start, all workers together | count |

Of local steps a vote is a round, its gradients are displacements, and instead of the two figures per step there are

| name | meaning | unit |
|---|---|---|
| ``vote/bytes_per_round`` | payload that a worker sent per round, the mean of all | bytes |
| ``vote/seconds_per_round`` | time a worker waited for others per round, the mean of all | seconds |
| ``vote/drift`` | root mean square of what workers differed by from the common parameters at the ends of rounds | 1 |
"""

from typing import Any

import numpy as np
import numpy.typing as npt

COUNTS = ("coordinates", "disagreements", "compared", "flips", "tallied", "ties", "nonfinite", "sent_bytes", "seconds")
"""What a worker counts: on how many coordinates it voted, and on how many of them its ballot was not the verdict; how
many had a verdict at the vote before, and how many of those changed; how many it tallied, and how many of those were
tied; gradient entries that were not finite; bytes of payload sent; seconds waited."""


def names(workers: int) -> list[str]:
    """Return the names of all figures, for logs that take no new ones later.

    Example:
        >>> len(names(workers=4))
        9
    """
    shares = [*(f"vote/agreement/rank{rank}" for rank in range(workers)), "vote/ties", "vote/flips"]
    return [*shares, "vote/bytes_per_step", "vote/exchange_seconds", "vote/nonfinite"]


def figures(rows: npt.NDArray[Any], steps: int, nonfinite: float) -> dict[str, float]:
    """Return the figures of some votes by name.

    Args:
        rows: each worker's `COUNTS` since the last figures, shape (workers, 9).
        steps: how many votes they are of, at least 1.
        nonfinite: gradient entries that were not finite in all votes before.

    Returns:
        Those that there are: no flips without an earlier verdict, no agreement of a worker that never voted.

    Example:
        >>> figures(np.array([[8, 2, 0, 0, 4, 1, 0, 10, 0.5], [8, 0, 0, 0, 4, 0, 3, 30, 0.5]]), steps=2, nonfinite=1)
        {'vote/agreement/rank0': 0.75, 'vote/agreement/rank1': 1.0, 'vote/ties': 0.125, 'vote/bytes_per_step': 10.0, \
'vote/exchange_seconds': 0.25, 'vote/nonfinite': 4.0}
    """
    coordinates, disagreements, compared, flips, tallied, ties, new, sent_bytes, seconds = np.asarray(rows).T
    values = {
        f"vote/agreement/rank{rank}": 1 - float(disagreements[rank] / coordinates[rank])
        for rank in range(len(rows))
        if coordinates[rank]
    }
    if compared[0]:
        values["vote/flips"] = float(flips[0] / compared[0])  # the verdict is the same on all
    if tallied.sum():
        values["vote/ties"] = float(ties.sum() / tallied.sum())
    values["vote/bytes_per_step"] = float(sent_bytes.mean()) / steps
    values["vote/exchange_seconds"] = float(seconds.mean()) / steps
    values["vote/nonfinite"] = float(nonfinite + new.sum())
    return values


def figures_of_rounds(rows: npt.NDArray[Any], rounds: int, nonfinite: float) -> dict[str, float]:
    """Return the figures of some rounds of local steps by name.

    Args:
        rows: each worker's `COUNTS` since the last figures, then the sum of the squares of its drift and of how many
            parameters, shape (workers, 11).
        rounds: how many they are of, at least 1.
        nonfinite: displacements that were not finite in all rounds before.

    Example:
        >>> rows = np.array([[8, 2, 0, 0, 4, 1, 0, 10, 0.5, 1.0, 8], [8, 0, 0, 0, 4, 0, 3, 30, 0.5, 3.0, 8]])
        >>> figures_of_rounds(rows, rounds=2, nonfinite=0)["vote/drift"]
        0.5
    """
    rows = np.asarray(rows)
    values = figures(rows[:, : len(COUNTS)], rounds, nonfinite)
    values["vote/bytes_per_round"] = values.pop("vote/bytes_per_step")
    values["vote/seconds_per_round"] = values.pop("vote/exchange_seconds")
    squares, parameters = rows[:, len(COUNTS) :].sum(0)
    values["vote/drift"] = float(np.sqrt(squares / max(parameters, 1)))
    return values
