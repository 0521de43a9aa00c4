"""`python -m signsgd_lightning.breakeven`; its answer from known costs; wrong options."""

import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from signsgd_core.network.costs import OURS, SCHEMES, Cost, flat
from signsgd_core.network.traffic import local_steps
from signsgd_lightning.breakeven import costs_of, main, report, report_local_steps, round_cost

OPTIONS = Namespace(bandwidth=1e6, latency=500.0, workers=4, parameters=1_000_000)


def test_it_answers_and_saves_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step is at least what was given, and the bytes' own time: 6 MB at 10 Mbit/s for DDP."""
    options = ["--bandwidth=10M", "--latency=2", "--workers=4", "--parameters=1e6", "--step-ms=30"]
    main([*options, f"--out={tmp_path / 'plots'}"])
    printed = capsys.readouterr().out
    assert "4 workers, 1,000,000 parameters, 2 ms a message\nstep without exchange: 30.0 ms (given)" in printed
    rows = dict(re.findall(r"^(\S.{23}) *([\d,.]+) +[\d.]+×", printed, re.MULTILINE))
    steps = {name.strip(): float(step.replace(",", "")) for name, step in rows.items()}
    assert list(steps) == list(SCHEMES), printed
    assert steps["DDP fp32"] > 30 + 6 * 2 + 4800
    assert 30 + 3 * 2 + 150 < steps[OURS] < steps["DDP fp32"] / 4
    assert (tmp_path / "plots" / "breakeven.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_measured_where_none_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--parameters=10000", "--workers=2", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert (
        float(re.findall(r"step without exchange: ([\d.]+) ms \(a perceptron's, batch 64, measured\)", printed)[0]) > 0
    )
    assert "fastest at 1 Gbit/s: " in printed


def test_costs_are_the_models() -> None:
    """A gather counts the ballots of four workers, and a vote those of one."""
    work = dict.fromkeys(SCHEMES, 1e-06) | {"message": 0.125, "cast": 1e-6, "tally": 2e-6, "apply": 3e-6}
    costs = costs_of(OPTIONS, work, compute=2.0)
    assert costs[OURS] == flat(OURS, 1_000_000, 4, 0.5, 2.0, 6e-6, per_message=0.125)
    assert costs["1-bit all-gather"] == flat("1-bit all-gather", 1_000_000, 4, 0.5, 2.0, 12e-6, per_message=0.125)
    assert costs["PowerSGD rank 4"] == flat("PowerSGD rank 4", 1_000_000, 4, 0.5, 2.0, 1e-6, per_message=0.125)


def test_it_says_where_the_answer_changes() -> None:
    costs = {OURS: Cost(1.5, 10**6), "mean": Cost(1.0, 32 * 10**6), "slow": Cost(2.0, 10**7), "few": Cost(9.5, 10**5)}
    lines = report(OPTIONS, costs).splitlines()
    assert [line.split("  ")[-1] for line in lines[2:5]] == [
        "faster above 62 Mbit/s",
        "never faster",
        "faster below 112 kbit/s",
    ]
    assert lines[-4:] == [
        f"fastest at 1 Mbit/s: {OURS}, 3.84 times as fast as few",
        "  on the slowest links: few",
        f"  from 112 kbit/s on: {OURS}",
        "  from 62 Mbit/s on: mean",
    ]


def test_it_advises_how_often_to_vote() -> None:
    """A round over 100 Mbit/s: 2·3/4·10⁶ bits and four messages."""
    work = dict.fromkeys(("cast", "tally", "apply", "displace", "message"), 0.0)
    options = Namespace(parameters=10**6, workers=4, latency=1.0, bandwidth=1e8)
    one = round_cost(options, work, 0.1)
    lines = report_local_steps(options, one, 0.1).splitlines()
    assert lines[-1].startswith("sync_every=4 costs 5% of a step at most at 100 Mbit/s; ")
    took = {line.split()[2]: float(line.split()[3]) for line in lines if line.startswith("H = ")}
    assert took["16"] == pytest.approx(100 + (4 + 8e3 * local_steps(10**6, 4, 1) / 1e8) / 16, abs=0.06)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--bandwidth=0", "--bandwidth: must be bits per second, more than 0, such as 1e9, 100M or 1G, got '0'"),
        ("--bandwidth=fast", "--bandwidth: must be bits per second, more than 0, such as 1e9, 100M or 1G, got 'fast'"),
        ("--bandwidth=inf", "--bandwidth: must be bits per second, more than 0, such as 1e9, 100M or 1G, got 'inf'"),
        ("--latency=-1", "--latency: must be milliseconds, 0 or more, such as 0.1, got '-1'"),
        ("--step-ms=0", "--step-ms: must be milliseconds, more than 0, such as 150, got '0'"),
        ("--step-ms=nan", "--step-ms: must be milliseconds, 0 or more, such as 0.1, got 'nan'"),
        ("--workers=1", "--workers: must be a whole number of 2 or more, since one worker sends nothing, got '1'"),
        ("--parameters=1.5", "--parameters: must be a whole number of 1 or more, such as 25000000 or 25e6, got '1.5'"),
        (
            "--parameters=1e999",
            "--parameters: must be a whole number of 1 or more, such as 25000000 or 25e6, got '1e999'",
        ),
    ],
)
def test_wrong_options_end_in_a_sentence(option: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main([option])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"python -m signsgd_lightning.breakeven: error: argument {sentence}"


def test_a_file_in_the_folders_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plots"
    path.write_text("mine")
    with pytest.raises(SystemExit, match="^2$"):
        main([f"--out={path}"])
    assert f"argument --out: must be a folder, and '{path}' is a file" in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(["--parameters=1000", "--step-ms=1", f"--out={tmp_path}"])
    assert capsys.readouterr().out.endswith("no plot, which needs matplotlib: pip install 'signsgd[demo]'\n")
