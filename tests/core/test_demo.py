"""The demos' option `--adversaries`: who the last workers are, and what the table says of them."""

from argparse import Namespace

import numpy as np
import pytest

from signsgd_core import demo

X = np.array([1.0, -2.0])


def _options(*arguments: str, workers: int = 4) -> Namespace:
    parser = demo.parser("demo", "", "workers", {"a": 0.1, "b": 0.2, "c": 0.3})
    options = parser.parse_args(arguments)
    demo.settle(parser, options, workers)
    return options


def test_the_last_workers_lie() -> None:
    lying = demo.adversaries(_options("--adversaries=invert,constant"))
    assert sorted(lying) == [2, 3]
    assert lying[2](X).tolist() == [-1.0, 2.0]
    assert lying[3](X).tolist() == [1.0, 1.0]


def test_each_run_gets_fresh_ones_and_each_worker_its_own() -> None:
    options = _options("--adversaries=random,random", workers=3)
    first, second = demo.adversaries(options), demo.adversaries(options)
    assert first[1](X).tolist() == second[1](X).tolist() != first[2](X).tolist()


def test_everybody_is_honest_unless_asked() -> None:
    assert demo.adversaries(_options()) == {}
    assert _options("--workers=2").workers == 2


@pytest.mark.parametrize("arguments", [["--workers=1", "--adversaries=nan"], ["--adversaries=nan,nan,nan,nan"]])
def test_somebody_must_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        _options(*arguments)
    assert "argument --adversaries: must be fewer than the " in capsys.readouterr().err


def test_the_table_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    results = [demo.Result("mean", 0.5, 1000, 0.1, True), demo.Result("vote", 0.75, 100, 0.1, True)]
    demo.report(results, _options("--no-plot"))
    assert "adversaries" not in capsys.readouterr().out
    demo.report(results, _options("--no-plot", "--adversaries=invert,nan"))
    assert "adversaries: the last 2 of 4 workers (invert, nan), in every run\n" in capsys.readouterr().out
