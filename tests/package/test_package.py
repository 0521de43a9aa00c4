"""What is built installs, and votes with torch alone; the version is said in one place and repeated rightly."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NOT_PYTHON = {
    "signsgd_core/py.typed",
    "signsgd_keras/py.typed",
    "signsgd_lightning/py.typed",
    "signsgd_lightning/kernels/native.c",
}
VOTE = """
import importlib.util, shutil, sys, warnings
import torch, torch.distributed as dist
from torch import nn
warnings.simplefilter("ignore")
from signsgd_lightning import Signum, enable_majority_vote, kernels

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = nn.Linear(4, 2)
optimizer = Signum(model.parameters(), lr=0.5, betas=(0, 0))
enable_majority_vote(model, optimizer)
start = model.weight.detach().clone()
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
moved = (model.weight - start).unique().tolist()
there = [n for n in ("lightning", "tensorflow", "keras", "transformers") if importlib.util.find_spec(n)]
compilers = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
if dist.get_rank() == 0:
    import signsgd_lightning
    assert "site-packages" in signsgd_lightning.__file__, signsgd_lightning.__file__
    print("moved by", moved, "beside", there, "compiled by", compilers, type(kernels.for_device(start.device)).__name__)
dist.destroy_process_group()
"""


def _run(*command: str | Path, **environment: str) -> str:
    settings = {**os.environ, **environment}
    ran = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=850, env=settings)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_one_version() -> None:
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    said = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert said is not None
    assert said[1] == VERSION
    for page in ("README.md", "docs/index.md"):
        assert VERSION in (ROOT / page).read_text(), page


@pytest.mark.nightly
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_the_wheel_votes_in_an_empty_environment(tmp_path: Path) -> None:
    """Without Lightning, TensorFlow and a compiler; torch comes from the registry that pip is set up with."""
    _run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {name for name in names if not name.endswith(".py") and ".dist-info/" not in name} == NOT_PYTHON
    with tarfile.open(source) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert names - inside <= {name for name in names if ".dist-info/" in name}
    assert f"-{VERSION}-" in wheel.name
    _run(sys.executable, "-m", "venv", tmp_path / "venv")
    commands = tmp_path / "venv" / "bin"
    _run(commands / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "torch", wheel)
    (tmp_path / "vote.py").write_text(VOTE)
    run = (commands / "python", "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    alone = {"PATH": str(commands), "XDG_CACHE_HOME": str(tmp_path), "CC": "", "GLOO_SOCKET_IFNAME": "lo"}
    printed = _run(*run, tmp_path / "vote.py", **alone, PYTHONPATH="", OMP_NUM_THREADS="1")
    assert "moved by [-0.5] beside [] compiled by [] NumpyKernel" in printed
