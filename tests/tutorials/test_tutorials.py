"""The tutorials run as scripts, their notebooks hold the same cells and were executed, and the short scripts vote."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

from tests.workers import free_port

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "tutorials"
NOTEBOOKS = (
    "01_majority_vote_by_hand",
    "02_lightning",
    "03_keras",
    "04_will_signs_work_for_my_model",
    "05_choosing_lr_and_betas",
    "06_slow_links",
)
TELLING = {
    "01_majority_vote_by_hand": (r"positive   ends 1\.00 from where it began, was at most 1\.00 away",),
    "02_lightning": (r"verdict momentum  resumed equals uninterrupted: True",),
    "03_keras": (
        r"Signum, vote            test accuracy 9\d\.\d%",
        r"vote/agreement/rank1  first 0\.\d+, last 0\.\d+",
        r"momenta of the replicas differ: True",
        r"parameters bit-identical: True",
        r"resumed equals uninterrupted: True",
        r"test accuracy 0\.9\d+ after 6 epochs of 11 steps",  # this and the next by multi_worker_keras.py
        r"parameters bit-identical on all 2 workers: True",
        r"- a vote among replicas cannot be compiled by XLA: .*",
        r"- Signum was made under no strategy .*",
        r"- VoteMonitor has no vote to watch: .*",
        r"- beta_1 must lie in \[0, 1\), got 1\.2",
    ),
    "04_will_signs_work_for_my_model": (
        r"Signs: R2 = 0\.\d+ and R1 = 0\.\d+, both well below 1: .*",
        r"Gradients: R2 = \d\d\.\d+ and R1 = \d\d\.\d+, both well above 1: .*",
        r"broken_instrument  SGD      test loss 0\.[23]\d+ with lr .*",
        r"broken_instrument  signSGD  test loss 0\.0\d+ with lr .*",
        r"many_instruments   SGD      test loss 0\.1[234]\d with lr .*",
        r"many_instruments   signSGD  test loss 0\.1[567]\d with lr .*",
        r"Signs: R2 = 0\.\d+, well below 1: the noise is sparser than the gradient\. .*",
    ),
    "05_choosing_lr_and_betas": (
        r"AdamW                 best lr 0\.0\d+ +loss 0\.0\d\d; .*",
        r"Signum \(0\.9, 0\.9\)     best lr 0\.00\d+ +loss 0\.[01]\d\d; .*",
        r"Signum \(0\.9, 0\.9\)     best lr / AdamW's 0\.[012]\d*",
        r"beta 0\.99: 894 steps",
    ),
    "06_slow_links": (
        r"magnitude 0\.625, verdict \[1\. 1\.\]: all go on from \[0\.375 0\.375\]",
        r"AdamW, plain DDP         test accuracy 9\d\.\d%,    6,761\.9 kB sent by each worker",
        r"a vote every 4 steps     test accuracy 9\d\.\d%,       5\d\.\d kB sent by each worker",
        r"a vote every 44 steps    test accuracy 9\d\.\d%,        \d\.\d kB sent by each worker",
        r"saved after 6 rounds, with 2 workers' states",
        r"two epochs more on three workers: test accuracy [89]\d\.\d%",
        r"ValueError: sync_every must be a whole number of 1 or more, got 0",
    ),
}
"""What each prints, line by line, in this order."""

PRIVATE = re.compile(r"site-packages|/(tmp|home|root|Users|usr|opt|mnt|var|work)/|Traceback|Warning")

# Several processes that import a framework take long on a busy machine.
pytestmark = [pytest.mark.timeout(480), pytest.mark.multiprocess]


def _run(*command: str, folder: Path) -> str:
    """Return what a command printed; none of its processes outlives it."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": paths}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=folder, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code = process.wait(timeout=420)
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        printed, errors = out.read(), err.read()
    assert code == 0, f"{printed}\n{errors}"
    return printed


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that still runs: first politely, for torchrun's workers have sessions of their own, then surely."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _assert_tells(name: str, printed: str) -> None:
    lines = iter(printed.splitlines())
    for pattern in TELLING[name]:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern!r} is missing or late in\n{printed}"


def _notebook(name: str) -> Any:
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def _cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


LONG = ("02_lightning", "03_keras", "04_will_signs_work_for_my_model", "05_choosing_lr_and_betas")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) if n in LONG else n for n in NOTEBOOKS])
def test_runs_as_a_script(name: str, tmp_path: Path) -> None:
    printed = _run(str(TUTORIALS / f"{name}.py"), folder=tmp_path)
    _assert_tells(name, printed)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "err"}, "it left files behind"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_the_cells_of_its_script(name: str) -> None:
    script = jupytext.read(TUTORIALS / f"{name}.py")
    assert _cells(jupytext.read(TUTORIALS / f"{name}.ipynb")) == _cells(script)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_was_executed_from_top_to_bottom(name: str) -> None:
    cells = [cell for cell in _notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data"), output
            assert output.get("name", "stdout") == "stdout", output


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_shows_what_the_script_says_and_nothing_of_the_machine(name: str) -> None:
    outputs = [output for cell in _notebook(name).cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    _assert_tells(name, text)
    assert not PRIVATE.search(text)
    assert set(_notebook(name).metadata) == {"kernelspec"}


def test_plain_ddp_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
    printed = _run(*torchrun, "--master-port", str(free_port()), str(TUTORIALS / "plain_ddp.py"), folder=tmp_path)
    assert "parameters bit-identical on all 2 ranks: True" in printed
    accuracy = re.search(r"test accuracy ([\d.]+) after", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_elastic(tmp_path: Path) -> None:
    """All who are there at the end have the same bits, and learnt the digits."""
    pytest.importorskip("torchft", reason="the extra `elastic` is not installed")
    printed = _run(str(TUTORIALS / "elastic.py"), str(tmp_path / "run"), folder=tmp_path)
    ends = re.findall(r"^worker \d: test accuracy ([\d.]+), bits sum up to (-?\d+)$", printed, re.MULTILINE)
    assert len(ends) == 4
    assert len(set(ends)) == 1
    assert float(ends[0][0]) > 0.85
    assert (tmp_path / "run" / "elastic.png").stat().st_size > 1000


def test_plain_ddp_is_short_and_needs_no_lightning() -> None:
    source = (TUTORIALS / "plain_ddp.py").read_text()
    assert len(source.splitlines()) < 40
    assert not re.search(r"^(import|from) (pytorch_)?lightning\b", source, re.MULTILINE)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["accelerate_gpt2", "hf_trainer_gpt2"])
def test_hugging_face_under_torchrun(name: str, tmp_path: Path) -> None:
    """Train, go on from what was saved, and send a 32nd of DDP's bytes but for set-up and checkpoints."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
    printed = ""
    for steps, more in ((8, ()), (16, ("--resume",))):
        port, saved = str(free_port()), str(tmp_path / "saved")
        options = ("--steps", str(steps), "--output", saved, *more)
        printed = _run(*torchrun, "--master-port", port, str(TUTORIALS / f"{name}.py"), *options, folder=tmp_path)
        assert "parameters bit-identical on all ranks: True" in printed
        found = re.search(r"loss ([\d.]+), in the end ([\d.]+) after (\d+) steps", printed)
        assert found is not None
        assert float(found[2]) < float(found[1])
        assert int(found[3]) == steps
    sent = re.search(r"([\d,]+) bytes sent per step; DDP in fp32 sends ([\d,]+)", printed)
    assert sent is not None
    ours, ddp = (int(number.replace(",", "")) for number in sent.groups())
    assert ours < ddp / 5


@pytest.mark.parametrize("name", ["accelerate_gpt2", "hf_trainer_gpt2"])
def test_hugging_face_is_short(name: str) -> None:
    assert len((TUTORIALS / f"{name}.py").read_text().splitlines()) < 60


def test_multi_worker_keras_is_short() -> None:
    assert len((TUTORIALS / "multi_worker_keras.py").read_text().splitlines()) < 40
