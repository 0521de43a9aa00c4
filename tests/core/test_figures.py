"""What counts come to: shares, means and sums under their names, and none that nothing was counted for."""

import numpy as np
import pytest

from signsgd_core.analysis.vote_figures import COUNTS, figures, names

FULL = np.array(
    [
        [16, 4, 8, 2, 8, 1, 0, 10, 0.5],
        [16, 0, 8, 2, 24, 3, 3, 30, 1.5],
    ]
)


def test_every_count_has_its_figure() -> None:
    assert FULL.shape[1] == len(COUNTS)
    values = figures(FULL, steps=2, nonfinite=4)
    assert values == {
        "vote/agreement/rank0": 0.75,
        "vote/agreement/rank1": 1.0,
        "vote/ties": 4 / 32,  # of all that was tallied, not the mean of the shares
        "vote/flips": 0.25,
        "vote/bytes_per_step": 10.0,
        "vote/exchange_seconds": 0.5,
        "vote/nonfinite": 7.0,
    }
    assert sorted(values) == sorted(names(2))


@pytest.mark.parametrize(
    ("row", "columns", "missing"),
    [
        (slice(None), ["compared", "flips"], ["vote/flips"]),
        (slice(None), ["tallied", "ties"], ["vote/ties"]),
        (1, ["coordinates", "disagreements"], ["vote/agreement/rank1"]),
    ],
)
def test_nothing_to_count_is_no_figure(row: int | slice, columns: list[str], missing: list[str]) -> None:
    rows, full = FULL.copy(), figures(FULL, steps=2, nonfinite=0)
    rows[row, [COUNTS.index(column) for column in columns]] = 0
    assert figures(rows, steps=2, nonfinite=0) == {name: full[name] for name in full if name not in missing}
