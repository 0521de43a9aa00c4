"""What works with what: the wheel in a fresh environment for each combination of versions, and a covering set of tests.

python -m benchmarks.versions --out benchmarks/results

`--rows` runs some of the combinations; the lines of the others stay in the table as they are. Versions that a
combination does not name are those of constraints.txt. A torch without `+cpu` is the registry's build with CUDA, some
gigabytes, whose tests run on the CPU. Where pip does not find a version, the table says so. Keras' tests are those
under TensorFlow's strategies, since its other backends are not installed. The tests run as a copy, which sees the
installed packages and not the checkout.
"""

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
CORE = [f"core/test_{name}.py" for name in ("reference", "ballots", "polar", "geometry", "theory")]
TORCH = [
    f"lightning/test_{name}.py"
    for name in (
        "compat",
        "optimizer_state",
        "ddp",
        "strategy",
        "checkpoint",
        "sharded",
        "sharded_fit",
        "fabric",
        "elastic",
        "compiled_step",
        "huggingface",
    )
]
KERAS = [f"keras/test_{name}.py" for name in ("ballots", "cross_device_ops", "transport", "multi_worker")]
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ml-dtypes"]
OF_TORCH = ["lightning", "torchft", "accelerate", "transformers", "tensorboard"]
HEAD = f"{machine()}, {platform.system()}; python -m benchmarks.versions"
NAMES = ["torch", "lightning", "keras", "tensorflow-cpu"]
"""Packages that tell combinations apart."""
SHOWN = 8
"""Failed tests of a combination that the table names."""
LIMIT = 1500.0
"""Seconds that an installation, or the tests of a combination, may take."""


@dataclass(frozen=True)
class Combination:
    """Versions that go together.

    Attributes:
        python: of the interpreter.
        versions: package -> version; what is not named, or is free, pip chooses under constraints.txt.
        free: packages that constraints.txt is not to pin.
    """

    python: str
    versions: dict[str, str]
    free: tuple[str, ...] = ()

    @property
    def tests(self) -> list[str]:
        """The files of tests."""
        return [*CORE, *(TORCH if "torch" in self.versions else []), *(KERAS if "keras" in self.versions else [])]

    @property
    def pinned(self) -> list[str]:
        """What pip is to install in just this version."""
        return [f"{name}=={version}" for name, version in self.versions.items()]

    @property
    def requirements(self) -> list[str]:
        """What pip is to install beside the wheel."""
        return [*self.pinned, *TOOLS, *(OF_TORCH if "torch" in self.versions else [])]


NOW = {"torch": "2.13.0+cpu", "lightning": "2.6.6"}
KERAS_NOW = {"keras": "3.15.1", "tensorflow-cpu": "2.21.0"}
OF_CUDA = ("triton",)
"""Which a build with CUDA chooses."""
COMBINATIONS = [
    Combination("3.11", {**NOW, **KERAS_NOW}),
    Combination(
        "3.11",
        {"torch": "2.13.0+cpu", "lightning": "2.6.0", "keras": "3.12.0", "tensorflow-cpu": "2.20.0"},
        free=("numpy", "protobuf", "ml_dtypes", "h5py", "pytorch-lightning", "tensorboard"),
    ),
    *(Combination("3.11", {**NOW, "torch": torch}, OF_CUDA) for torch in ("2.8.0", "2.14.1")),
    *(Combination(python, {**NOW, "torch": "2.13.0"}, OF_CUDA) for python in ("3.12", "3.13")),
    *(Combination(python, KERAS_NOW) for python in ("3.12", "3.13")),
]


@dataclass
class Row:
    """What came of a combination.

    Attributes:
        combination: it.
        result: in words.
        installed: package -> version, as pip says.
        failed: the tests that did.
    """

    combination: Combination
    result: str
    installed: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command and return its exit code and all that it printed; 124 past the limit."""
    settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.Popen(
        command,
        cwd=folder,
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = ran.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(ran.pid, signal.SIGKILL)  # with the processes that tests have started
        ran.communicate()
        return 124, f"not through within {LIMIT:g} s"
    return ran.returncode, said


def interpreter(version: str) -> str | None:
    """Return an interpreter of a version, on the path or where pyenv has them."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for one in filter(None, candidates):
        code, said = run([str(one), "--version"], ROOT)  # pyenv's stand-ins on the path may have nothing behind them
        if code == 0 and said.startswith(f"Python {version}."):
            return str(one)
    return None


def constraints(combination: Combination) -> str:
    """Return constraints.txt without what a combination names or frees."""
    named = {_plain(name) for name in (*combination.versions, *combination.free)}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "\n".join(line for line in lines if _plain(line.partition("==")[0]) not in named)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def attempt(combination: Combination, wheel: Path, folder: Path) -> Row:
    """Make the environment and run the tests in it."""
    python = interpreter(combination.python)
    if python is None:
        return Row(combination, f"not run: there is no Python {combination.python}")
    environment = folder / "venv"
    shutil.rmtree(environment, ignore_errors=True)  # of the combination before, which may have some gigabytes
    run([python, "-m", "venv", str(environment)], folder)
    inside = str(environment / "bin" / "python")
    (folder / "constraints.txt").write_text(constraints(combination))
    install = [inside, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    for one in combination.pinned:  # one by one, since the resolver would name no reason
        code, said = run([*install, "--dry-run", "--no-deps", one], folder)
        if code:
            return Row(combination, f"not run: pip finds no {one}")
    code, said = run([*install, "-c", "constraints.txt", str(wheel), *combination.requirements], folder)
    if code:
        reasons = [line for line in said.splitlines() if "ERROR" in line or "conflict" in line]
        return Row(combination, f"not installed: {(reasons or said.splitlines() or [''])[0]}")
    _, listed = run([inside, "-m", "pip", "list", "--format", "freeze"], folder)
    installed = dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)
    files = [f"tests/{name}" for name in combination.tests]
    begin = time.monotonic()
    code, said = run([inside, "-P", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files], folder)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    closing = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error)[^=]*?) in [\d.]+s", said, re.MULTILINE)
    words = closing[-1] if closing else f"exit code {code}: {(said.splitlines() or [''])[-1]}"
    if code:
        print(said[-8000:], file=sys.stderr)
    return Row(combination, f"{words}, {time.monotonic() - begin:.0f} s", installed, failed)


def cells(combination: Combination) -> str:
    """Return the begin of a combination's line, which tells it from others."""
    found = {_plain(name): version for name, version in combination.versions.items()}
    return f"{combination.python:<8}" + "".join(f"{found.get(name, '-'):<16}" for name in NAMES)


def table(row: Row) -> Iterator[str]:
    """Return the lines of a combination."""
    numpy = row.installed.get("numpy", "-")
    yield f"{cells(row.combination)}{numpy:<16}{row.result}"
    yield from (f"{'':<8}{name}" for name in row.failed[:SHOWN])
    if row.failed[SHOWN:]:
        yield f"{'':<8}and {len(row.failed) - SHOWN} more"


def merge(old: str, rows: list[Row]) -> str:
    """Return the table with new rows, and the old ones of combinations that were not run again."""
    new = {cells(row.combination): list(table(row)) for row in rows}
    lines = [HEAD, f"{'Python':<8}" + "".join(f"{name:<16}" for name in NAMES) + f"{'numpy':<16}tests"]
    for begin in map(cells, COMBINATIONS):
        kept = re.search(rf"^{re.escape(begin)}.*(\n {{8}}.*)*", old, re.MULTILINE)
        lines += new.get(begin, kept[0].split("\n") if kept else [])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of combinations, from 0 (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the table (default: save nothing)")
    options = parser.parse_args()
    chosen = COMBINATIONS if options.rows is None else [COMBINATIONS[k] for k in options.rows]
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        code, said = run([sys.executable, "-m", "build", "--wheel", "--outdir", name, str(ROOT)], ROOT)
        if code:
            sys.exit(said)
        (wheel,) = folder.glob("*.whl")
        for combination in chosen:
            rows.append(attempt(combination, wheel, folder))
            print(*table(rows[-1]), sep="\n", flush=True)
            if options.out is not None:  # at once, since all of them take long
                path = options.out / "versions.txt"
                path.write_text(merge(path.read_text() if path.exists() else "", rows))


if __name__ == "__main__":
    main()
