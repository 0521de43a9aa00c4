"""What both demos share and no framework is needed for: options, data, table and plot."""

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from ..adversaries import ADVERSARIES, Adversary
from ..ballots import Zeros
from ..settings import check_betas
from . import images


class Data(NamedTuple):
    """Images, uint8 of shape (count, channels, height, width), and their labels, int64 of shape (count,)."""

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]


@dataclass
class Result:
    """What one training came to.

    Attributes:
        method: its name.
        accuracy: on the test images, 0 to 1.
        bytes_per_step: what a worker sent per step, the mean of all, or None where it is not known.
        step_seconds: the median.
        identical: whether all workers' parameters were bit-identical at the end.
        curve: (bytes sent so far, accuracy) at each evaluation.
    """

    method: str
    accuracy: float
    bytes_per_step: float | None
    step_seconds: float
    identical: bool
    curve: list[tuple[float, float]] = field(default_factory=list)


def parser(
    program: str, description: str, workers: str, learning_rates: Mapping[str, float]
) -> argparse.ArgumentParser:
    """Return the parser of the options that both demos have; with it a wrong one ends the program with a sentence.

    Args:
        program: how it is called.
        description: what it does.
        workers: what they are, and how many by default.
        learning_rates: method -> the default of its learning rate, in the order of the runs.
    """
    parser = argparse.ArgumentParser(program, description=description)
    add = parser.add_argument
    add("--workers", type=_whole, help=workers)
    add("--steps", type=_whole, default=240, help="training steps of each method (default: %(default)s)")
    defaults, (*names, last) = tuple(learning_rates.values()), learning_rates
    rates = f"learning rate, one for all or one each for {', '.join(names)} and {last}"
    default = ",".join(map(str, defaults))
    add(
        "--lr",
        type=partial(_rates, len(defaults)),
        default=defaults,
        metavar="LR[,LR,…]",
        help=f"{rates} (default: {default})",
    )
    add("--betas", type=_betas, default=(0.9, 0.9), metavar="B1,B2", help="of Signum (default: 0.9,0.9)")
    add("--verdict-momentum", type=_share, default=0.8, metavar="G", help="of the third run (default: %(default)s)")
    add("--zeros", choices=get_args(Zeros), help="what zeros and ties count as (default: alternate)")
    lies = f"what the last workers make of their gradients in every run, one name a worker: {', '.join(ADVERSARIES)}"
    add("--adversaries", type=_adversaries, default=(), metavar="NAME[,NAME]", help=f"{lies} (default: none)")
    add("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    add("--data", type=_folder, help=f"folder with {images.LAYOUT} (default: handwritten digits)")
    add("--out", type=Path, default=Path("signsgd_demo"), help="where to save the plot (default: %(default)s)")
    add("--no-plot", dest="plot", action="store_false", help="save no plot")
    return parser


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace, workers: int) -> None:
    """Write into the options how many workers there are; end the program if none of them would be honest.

    Args:
        parser: of the options.
        options: of the command line.
        workers: how many where `--workers` was left out.
    """
    options.workers = options.workers or workers
    if len(options.adversaries) >= options.workers:
        count = len(options.adversaries)
        parser.error(f"argument --adversaries: must be fewer than the {options.workers} workers, got {count}")


def adversaries(options: argparse.Namespace) -> dict[int, Adversary]:
    """Return what the last workers are, afresh.

    Args:
        options: of the command line, with the number of workers settled.
    """
    first = options.workers - len(options.adversaries)
    return {worker: ADVERSARIES[name](worker) for worker, name in enumerate(options.adversaries, first)}


def load(folder: Path | None, cache: Path, tell: bool = True) -> Data:
    """Return the digits that scikit-learn ships, or the images below a folder.

    Args:
        folder: with ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, images of one size; None for the digits.
        cache: where to keep the decoded images, so that a second run starts at once unless the folder changed.
        tell: whether to print what was skipped in the folder.

    Raises:
        ValueError: if an image cannot be read or differs in size, a class has no training image, a part no image.
    """
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.minimum(digits.images[:, None] * 16, 255).astype(np.uint8)
        labels, order = digits.target.astype(np.int64), np.random.default_rng(0).permutation(len(pixels))
        train, test = order[:-450], order[-450:]
        return Data(pixels[train], labels[train], pixels[test], labels[test])
    listing = images.scan(folder)
    for note in listing.notes if tell else ():
        print(note)
    kept_of_folder = f"images-{_digest(str(folder.resolve()))}"
    saved = cache / f"{kept_of_folder}-{_digest(images.state(folder, listing))}.npz"
    broken = ValueError, KeyError, EOFError, BadZipFile
    with suppress(OSError, *broken), saved.open("rb") as file, np.load(file) as arrays:
        return Data(*(arrays[f"arr_{k}"] for k in range(4)))
    data = Data(*images.decode(listing))
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{kept_of_folder}-{uuid4().hex}.npz"
    np.savez(part, *data)
    with suppress(FileNotFoundError):  # another process has just saved the same, and removed this one
        part.replace(saved)  # never half a file under the final name
    for other in set(cache.glob(f"{kept_of_folder}*.npz")) - {saved}:
        other.unlink(missing_ok=True)
    return data


def report(results: Sequence[Result], options: argparse.Namespace, by_formula: str = "") -> None:
    """Print the table and, if asked for, save the plot.

    Args:
        results: of all methods; the first is what the others' bytes are compared with.
        options: of the command line.
        by_formula: why the bytes are by formula; empty where they were counted.
    """
    print_table(results, by_formula)
    if options.adversaries:
        count, names = len(options.adversaries), ", ".join(options.adversaries)
        print(f"adversaries: the last {count} of {options.workers} workers ({names}), in every run")
    if options.plot:
        path = options.out / "accuracy_against_bytes.png"
        save_plot(results, path, by_formula)
        print(f"plot: {path}")


def print_table(results: Sequence[Result], by_formula: str = "") -> None:
    """Print one line a method; the first is what the others' bytes are compared with."""
    print(f"\n{'method':<34}{'accuracy':>9}{'bytes/step':>13}{'fewer':>8}{'step':>10}  workers")
    for result in results:
        sent, first = result.bytes_per_step, results[0].bytes_per_step
        count = f"{sent:,.0f}" if sent else "—"
        fewer = f"{first / sent:.1f}×" if sent and first else "—"
        same = "bit-identical" if result.identical else "DIFFERENT"
        step = f"{result.step_seconds * 1e3:.1f} ms"
        print(f"{result.method:<34}{result.accuracy:>9.1%}{count:>13}{fewer:>8}{step:>10}  {same}")
    counted = "what one worker sent, counted by the kernel at its TCP sockets; the mean of all workers"
    print(f"bytes/step: {f'by formula, {by_formula}' if by_formula else counted}")


def save_plot(results: Sequence[Result], path: Path, by_formula: str = "") -> None:
    """Save accuracy against bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for result in results:
        megabytes, accuracy = np.array(result.curve).T * [[1e-6], [1]]
        axes.plot(megabytes, accuracy, marker="o", markersize=3, label=result.method)
    sent = "megabytes of each worker, by formula" if by_formula else "megabytes sent by each worker"
    axes.set(xscale="log", xlabel=sent, ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    values = _numbers(text)
    if len(values) != 1 or not 0 <= values[0] < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {text!r}")
    return values[0]


def _rates(count: int, text: str) -> tuple[float, ...]:
    rates = _numbers(text)
    if len(rates) not in (1, count) or min(rates) <= 0:
        raise argparse.ArgumentTypeError(
            f"must be 1 or {count} positive numbers such as 1e-3 or 1e-3,5e-4,…, got {text!r}"
        )
    return rates * count if len(rates) == 1 else rates


def _betas(text: str) -> tuple[float, float]:
    try:
        return check_betas(_numbers(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, got {text!r}") from None


def _adversaries(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(ADVERSARIES):
        raise argparse.ArgumentTypeError(f"must be names of {', '.join(ADVERSARIES)}, got {text!r}")
    return names


def _folder(text: str) -> Path:
    try:
        images.scan(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
