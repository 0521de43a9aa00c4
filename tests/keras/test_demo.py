"""`python -m signsgd_keras` as a user runs it, in both modes; what it trains; wrong options; workers that die."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_core import demo
from signsgd_core.network import traffic
from signsgd_keras.__main__ import main
from signsgd_keras.demo import batches, network
from tests.clusters import Cluster
from tests.devices import mirrored

ROOT = Path(__file__).parents[2]
PARAMETERS = 64 * 512 + 512 + 512 * 256 + 256 + 10 * 256 + 10
LOG = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:(?!.*oneDNN)", re.MULTILINE)
"""A line of TensorFlow's log, but for the one that it prints at any log level, on some processors."""

ROW = re.compile(r"^(.{34}) *([\d.]+)% *([\d,]+) *([\d.]+)× *([\d.]+) ms  bit-identical$", re.MULTILINE)

# TensorFlow is imported by up to three processes: long where cores are shared.
pytestmark = [pytest.mark.timeout(300), pytest.mark.multiprocess]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the demo with these arguments in a session of its own, all of which is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "MPLBACKEND": "Agg", **variables}
        for name in ("TF_CONFIG", "TF_CPP_MIN_LOG_LEVEL"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "signsgd_keras", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, env=environment, cwd=tmp_path, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _rows(process: "subprocess.Popen[str]", note: str) -> list[tuple[str, float, int, float]]:
    """Method, accuracy in percent, bytes per step, how many times fewer: of a demo that ended well."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert not LOG.search(errors), errors
    rows = [(m.strip(), float(a), int(b.replace(",", "")), float(f)) for m, a, b, f, _ in ROW.findall(output)]
    methods = ["Adam, averaged gradients", "Signum (0.9, 0.9), vote", "verdict momentum 0.8, vote", "SignMuon, vote"]
    assert [method for method, *_ in rows] == methods, output
    assert all(accuracy > 60 for _, accuracy, *_ in rows), output  # ten classes: 10 by chance
    assert output.count(f"{PARAMETERS:,} parameters, 2 workers, 16 steps") == 4  # by one worker only
    assert f"bytes/step: {note}" in output
    return rows


def _workers(group: int) -> list[int]:
    """The processes of a session that are alive, but for its leader."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
            if int(session) == group and state != "Z" and int(status.parent.name) != group:
                found.append(int(status.parent.name))
    return sorted(found)


def _until(what: Callable[[], bool], patience: float = 90) -> bool:
    deadline = time.monotonic() + patience
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_replicas_of_one_process(start: Start, tmp_path: Path) -> None:
    rows = _rows(start("--workers=2", "--steps=16", "--out=here"), "by formula, since ")
    full = traffic.ring_all_reduce(PARAMETERS, 2, bits=32)
    voted = traffic.majority_vote(PARAMETERS, 2)
    assert [sent for _, _, sent, _ in rows] == [full, voted, voted, voted]
    assert (tmp_path / "here" / "accuracy_against_bytes.png").stat().st_size > 10_000


@pytest.mark.nightly
def test_worker_processes_count_what_they_send(start: Start, tmp_path: Path) -> None:
    process = start("--workers=2", "--steps=16", "--processes", "--out=there")
    rows = _rows(process, "what one worker sent, counted by the kernel")
    full, voted = traffic.ring_all_reduce(PARAMETERS, 2, bits=32), traffic.majority_vote(PARAMETERS, 2)
    for (_, _, sent, fewer), payload in zip(rows, (full, voted, voted, voted), strict=True):
        assert payload < sent < 1.1 * payload  # and gRPC's headers
        assert fewer == round(rows[0][2] / sent, 1)
    assert all(fewer > 20 for _, _, _, fewer in rows[1:])
    assert (tmp_path / "there" / "accuracy_against_bytes.png").stat().st_size > 10_000
    assert _workers(process.pid) == []


@pytest.mark.nightly
def test_a_vote_outlives_a_worker_that_sends_nan_and_a_mean_does_not(start: Start) -> None:
    process = start("--workers=3", "--steps=16", "--adversaries=nan", "--no-plot")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    mean, *votes = (float(accuracy) for _, accuracy, *_ in ROW.findall(output))
    assert mean < 20
    assert len(votes) == 3
    assert min(votes) > 60
    assert "adversaries: the last 1 of 3 workers (nan), in every run\n" in output


@pytest.mark.nightly
def test_no_worker_is_left_behind(start: Start) -> None:
    """One worker dies, the demo is told to end, the demo is killed: the others end too."""
    dying, told, killed = (start("--workers=2", "--processes", "--no-plot") for _ in range(3))
    for process in (dying, told, killed):
        assert _until(lambda: len(_workers(process.pid)) == 2)  # noqa: B023
    os.kill(_workers(dying.pid)[1], signal.SIGKILL)
    _, errors = dying.communicate(timeout=30)
    assert dying.returncode == 1
    assert "python -m signsgd_keras: worker 1 failed with exit status -9" in errors
    told.terminate()
    told.communicate(timeout=30)
    assert told.returncode == 128 + signal.SIGTERM
    assert _workers(dying.pid) == _workers(told.pid) == []
    killed.kill()
    assert _until(lambda: _workers(killed.pid) == [])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "1,2"], "--lr: must be 1 or 4 positive numbers such as 1e-3 or"),
        (["--workers", "0"], "--workers: must be a whole number of 1 or more, got '0'"),
        (["--betas", "0.9"], "--betas: betas must be a pair of numbers"),
        (
            ["--adversaries", "invert,thief"],
            "--adversaries: must be names of invert, random, constant, ",
        ),
        (["--workers=2", "--adversaries=nan,nan"], "--adversaries: must be fewer than the 2 workers, got 2"),
        (["--processes", "--adversaries=" + "nan," * 3 + "nan"], "must be fewer than the 4 workers, got 4"),
        (["--process=4"], "ignored explicit argument '4'"),
    ],
)
def test_wrong_options_end_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m signsgd_keras: error: ")
    assert sentence in last


def test_help_names_methods_and_modes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "one each for Adam, Signum, verdict momentum and SignMuon (default: " in words
    assert "--processes start the workers as processes, on the CPU" in words


def _errors() -> str:
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match="^2$"):
        main([])
    return errors.getvalue()


def test_another_backend_is_refused_with_a_sentence(backend: Callable[[str], Cluster]) -> None:
    (errors,) = backend("jax").run(_errors)
    assert errors.endswith("needs Keras' TensorFlow backend, got 'jax': set KERAS_BACKEND=tensorflow\n")


def test_every_method_trains_on_the_same_batches() -> None:
    images = np.arange(160, dtype=np.uint8)[:, None, None, None]
    data = demo.Data(images, np.arange(160), images, np.arange(160))
    seen = []
    for draws in (0, 3):  # what a method drew before is no matter
        keras.utils.set_random_seed(5)
        for _ in range(draws):
            tf.random.uniform((2,))
        replicas = mirrored(2).experimental_distribute_dataset(batches(data, workers=2, seed=5))
        seen.append([np.stack([row.numpy() for row in labels.values]) for _, (_, labels) in zip("12345", replicas)])  # noqa: B905
    assert np.array(seen).shape == (2, 5, 2, 32)
    assert np.array_equal(seen[0], seen[1])
    assert (np.bincount(np.array(seen[0]).ravel(), minlength=160) == 2).all()  # twice round, each image once a round


def test_larger_images_get_a_residual_network() -> None:
    model = network((3, 32, 32), classes=7)
    assert model(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 7)
    assert 1e6 < model.count_params() < 2e6
    assert not model.non_trainable_variables  # nothing that replicas could differ in but what is voted on
