"""A folder of images, ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``: what counts in it, what is skipped, its pixels.

As with torchvision's ``ImageFolder``, the folders' names in order are the classes, and an empty one is an error. Both
parts have the labels of the training part, so a class may lack test images: a note says so.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SUFFIXES = (".jpg", ".jpeg", ".png")
"""What names of images end with, in any case."""

LAYOUT = "train/CLASS/*.jpg and test/CLASS/*.jpg (or .jpeg, .png), images of one size"

NO_IMAGE = "file that is no image", "files that are no images"

Skipped = dict[tuple[str, str], list[Path]]
"""(what is skipped, the same in the plural) -> which."""


class Listing(NamedTuple):
    """What is in a folder of images.

    Attributes:
        train: (file, label) of each training image, in the order of classes and names.
        test: the same of the test images.
        notes: lines that say what is skipped, and which classes have no test images.
    """

    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    notes: list[str]


def scan(folder: Path) -> Listing:
    """Return what is in a folder; no image is opened.

    Args:
        folder: with a folder for each class in its folders ``train`` and ``test``. Hidden ones do not count.

    Raises:
        ValueError: if a part has no images, a training class has none, or the test part has other classes.
    """
    skipped: Skipped = defaultdict(list)
    train, test = (_classes(folder, part, skipped) for part in ("train", "test"))
    for name, paths in train.items():
        if not paths:
            kinds = ", ".join(SUFFIXES)
            remedy = "add images or remove the folder"
            raise ValueError(f"{folder / 'train' / name}: no image ({kinds}) directly in it: {remedy}")
    if unknown := test.keys() - train.keys():
        known = f"the classes of {folder / 'train'} ({_few(train)})"
        raise ValueError(f"{folder / 'test'} has {_few(sorted(unknown))}, not among {known}: add, rename or remove it")
    counts = [
        f"{len(paths)} {words[len(paths) > 1]} ({_few(path.relative_to(folder).as_posix() for path in paths)})"
        for words, paths in skipped.items()
    ]
    notes = [f"skipped: {', '.join(counts)}"] if counts else []
    if untested := [name for name in train if not test.get(name)]:
        notes.append(f"no test images of: {_few(untested)}")
    labels = {name: label for label, name in enumerate(train)}
    parts = [[(path, labels[name]) for name, paths in part.items() for path in paths] for part in (train, test)]
    return Listing(parts[0], parts[1], notes)


def state(folder: Path, listing: Listing) -> str:
    """Return a text that changes when an image is added, removed, renamed or written.

    Args:
        folder: that was scanned.
        listing: of it.

    Raises:
        ValueError: if an image is no file, or empty.
    """
    return repr([(path.relative_to(folder).as_posix(), *_status(path)) for path, _ in listing.train + listing.test])


def decode(listing: Listing) -> tuple[npt.NDArray[Any], ...]:
    """Return training images, their labels, test images, their labels.

    Args:
        listing: of the folder.

    Raises:
        ValueError: if an image cannot be read, or has another size than the first.
    """
    files, decoded = listing.train + listing.test, list[npt.NDArray[np.uint8]]()
    for path, _ in files:
        decoded.append(pixels(path))
        (height, width), (first_height, first_width) = decoded[-1].shape[1:], decoded[0].shape[1:]
        if (height, width) != (first_height, first_width):
            first = f"{files[0][0]} with {first_width}×{first_height}"
            raise ValueError(f"{path} is shown with {width}×{height} pixels, {first}: resize all to one size")
    labels, count = np.array([label for _, label in files], np.int64), len(listing.train)
    return np.stack(decoded[:count]), labels[:count], np.stack(decoded[count:]), labels[count:]


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    """Return an image upright, as RGB without its transparency, uint8 of shape (3, height, width).

    Args:
        path: of an image in any format that Pillow reads, whatever it is called.

    Raises:
        ValueError: if Pillow cannot read it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as stored:
            image = ImageOps.exif_transpose(stored)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"its pixels of mode {image.mode} are not of 8 or 16 bits")
        elif image.mode == "P":  # Pillow warns of transparency where the next line drops it
            image = image.convert("RGBA")
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))  # as it comes from the cache
    except Exception as error:  # broken files raise OSError, SyntaxError, ValueError and others
        raise _unreadable(path, str(error)) from error


def _classes(folder: Path, part: str, skipped: Skipped) -> dict[str, list[Path]]:
    """Return class -> its images."""
    classes: dict[str, list[Path]] = {}
    for path in _visible(folder / part, skipped) if (folder / part).is_dir() else ():
        if os.path.isdir(path) or not os.path.exists(path):  # no class is lost to a broken link: listing it fails
            classes[path.name] = []
        elif _is_image(path):
            skipped["image in no class", "images in no class"].append(path)
        else:
            skipped[NO_IMAGE].append(path)
    for name, images in classes.items():
        for path in _visible(folder / part / name, skipped):
            if _is_image(path):
                images.append(path)
            elif os.path.isdir(path):
                skipped["folder inside a class", "folders inside classes"].append(path)
            else:
                skipped[NO_IMAGE].append(path)
    if not any(classes.values()):
        raise ValueError(f"{folder} has no {part}/CLASS/*.jpg (or .jpeg, .png) in it")
    return classes


def _visible(folder: Path, skipped: Skipped) -> list[Path]:
    """Return what is not hidden in a folder, by name."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}): mend or remove it") from None
    for path in paths:
        if path.name.startswith("."):
            kind = "folder" if os.path.isdir(path) else "file"
            skipped[f"hidden {kind}", f"hidden {kind}s"].append(path)
    return [path for path in paths if not path.name.startswith(".")]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _status(path: Path) -> tuple[int, ...]:
    """Return numbers of which one changes with the file, even where another file has its size and time."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, f"{error.strerror}: {os.path.realpath(path)}") from None  # the target of a link
    if not stat.S_ISREG(status.st_mode):  # Pillow would wait for ever for a pipe
        raise _unreadable(path, f"it is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}")
    if not status.st_size:
        raise _unreadable(path, "it is empty")
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read as an image ({reason}): mend or remove it")


def _few(names: Iterable[str]) -> str:
    """Return the first three, in quotes."""
    first, more = (names := list(names))[:3], len(names) > 3
    return ", ".join(map(repr, first)) + ", …" * more
