"""Accumulation, clipping, liars and gradient scalers under an elastic vote: `==` the reference; odd settings."""

from pathlib import Path

import numpy as np
import pytest

from signsgd_core import Reference
from tests.elastic import crew
from tests.elastic_uses import ADVERSARIES, SETTINGS, STEPS, schedule_by_numpy, use

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")


@pytest.mark.multiprocess
@pytest.mark.parametrize("scaled", [False, True], ids=["clipped", "scaled"])
def test_gradients_are_those_that_the_user_made(scaled: bool, tmp_path: Path) -> None:
    """A worker whose gradient overflows casts neutral ballots there, and lowers its scale."""
    with crew(tmp_path) as (workers, _):
        names = [workers.start(scaled, use) for _ in range(3)]
        workers.join(*names)
        steps = list(zip(*(workers.log(name) for name in names), strict=True))
    start = [np.array(x, np.float32) for x in steps[0][0]["before"]]
    lr, betas = SETTINGS["lr"], SETTINGS["betas"]
    reference = Reference(start, 3, lr, betas, zeros="alternate", adversaries=ADVERSARIES)
    assert len(steps) == STEPS
    for lines in steps:
        assert sorted(line["number"] for line in lines) == [0, 1, 2]
        lines = sorted(lines, key=lambda line: line["number"])
        reference.step([[np.array(g, np.float32) for g in line["gradients"]] for line in lines])
        for line in lines:
            for x, given in zip(reference.parameters, line["after"], strict=True):
                np.testing.assert_array_equal(x, np.array(given, np.float32), f"step {line['step']}")
    assert {line["scale"] for line in steps[-1]} == ({2.0**9} if scaled else {1.0})


@pytest.mark.multiprocess
@pytest.mark.parametrize("odd", [False, True], ids=["numbers", "no plain value"])
def test_settings_that_a_newcomer_takes_over(odd: bool, tmp_path: Path) -> None:
    """NumPy's numbers are; where something else is among them, the newcomer ends and the other one continues."""
    with crew(tmp_path) as (workers, _):
        first = workers.start(odd, schedule_by_numpy)
        workers.wait(lambda: workers.step(first) > 2)
        second = workers.start(odd, schedule_by_numpy)
        if odd:
            workers.wait(lambda: not workers.processes[second].is_alive())
            assert workers.processes[second].exitcode == 1
            assert "this worker cannot join, for the others' state has something else" in workers.said(second)
            assert "PosixPath" in workers.said(second)
        workers.join(*([first] if odd else [first, second]))
        ends = [workers.log(name)[-1] for name in ([first] if odd else [first, second])]
    assert {end["step"] for end in ends} == {60}
    assert odd or (ends[0] == ends[1] and ends[0]["workers"] == 2)
