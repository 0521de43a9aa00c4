"""The demos' option `--data`: what counts, what is said, what is refused, pixels, and the cache."""

import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from signsgd_core import demo
from signsgd_core.demo import images

Change = Callable[[Path], Any]
SIZE = (6, 4)
"""Width and height."""


def _save(path: Path, shade: int = 0, size: tuple[int, int] = SIZE, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path, "PNG", **options)


def _write(path: Path, content: bytes | str = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _all(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def _saves(*names: str) -> Change:
    return _all(*(lambda folder, name=name: _save(folder / name) for name in names))


def _writes(*names: str) -> Change:
    return _all(*(lambda folder, name=name: _write(folder / name) for name in names))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images in each part; the shade is the name."""
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            for shade in (10, 20):
                _save(tmp_path / "data" / part / kind / f"{shade}.jpg", shade)
    return tmp_path / "data"


def _load(folder: Path, tell: bool = True) -> demo.Data:
    return demo.load(folder, folder.parent / "cache", tell)


def _counts(data: demo.Data) -> tuple[list[int], list[int]]:
    assert data.train_images.shape == (len(data.train_labels), 3, SIZE[1], SIZE[0])
    assert data.test_images.shape == (len(data.test_labels), 3, SIZE[1], SIZE[0])
    return np.bincount(data.train_labels).tolist(), np.bincount(data.test_labels).tolist()


def _assert_same(one: demo.Data, other: demo.Data) -> None:
    for name in demo.Data._fields:
        first, second = getattr(one, name), getattr(other, name)
        assert np.array_equal(first, second)
        assert (first.dtype, first.strides) == (second.dtype, second.strides)


COUNTS: dict[str, tuple[Change, list[int], list[int], str]] = {
    "plain": (lambda f: None, [2, 2], [2, 2], ""),
    "spellings": (
        _saves(*(f"train/cat/{name}" for name in ("a.JPG", "b.jpeg", "c.JPEG", "d.png", "e.Png"))),
        [7, 2],
        [2, 2],
        "",
    ),
    "one class in capitals": (
        lambda f: [path.rename(path.with_suffix(".JPG")) for path in f.glob("*/dog/*")],
        [2, 2],
        [2, 2],
        "",
    ),
    "links": (
        _all(
            lambda f: _save(f / "aside/elk/1.png"),
            lambda f: (f / "train/elk").symlink_to(f / "aside/elk"),
            lambda f: (f / "train/cat/link.jpg").symlink_to(f / "aside/elk/1.png"),
            lambda f: (f / "test/elk").symlink_to(f / "train/elk"),
        ),
        [3, 2, 1],
        [2, 2, 1],
        "",
    ),
    "hidden folder": (
        lambda f: (f / "train/.ipynb_checkpoints").mkdir(),
        [2, 2],
        [2, 2],
        "skipped: 1 hidden folder ('train/.ipynb_checkpoints')\n",
    ),
    "hidden folders with images": (
        _saves("train/.old/1.jpg", "test/.old/1.jpg", "train/dog/.old/1.jpg"),
        [2, 2],
        [2, 2],
        "skipped: 3 hidden folders ('train/.old', 'train/dog/.old', 'test/.old')\n",
    ),
    "hidden files": (
        _writes("train/cat/._1.jpg", "train/cat/.jpg", "train/.DS_Store"),
        [2, 2],
        [2, 2],
        "skipped: 3 hidden files ('train/.DS_Store', 'train/cat/._1.jpg', 'train/cat/.jpg')\n",
    ),
    "no images": (
        _writes("train/cat/Thumbs.db", "train/cat/a.gif", "train/dog/x.jpg.part", "train/x.csv"),
        [2, 2],
        [2, 2],
        "skipped: 4 files that are no images ('train/x.csv', 'train/cat/Thumbs.db', 'train/cat/a.gif', …)\n",
    ),
    "not in a class": (
        _saves("test/1.jpg", "train/cat/more/1.jpg"),
        [2, 2],
        [2, 2],
        "skipped: 1 folder inside a class ('train/cat/more'), 1 image in no class ('test/1.jpg')\n",
    ),
    "a name that is no Unicode": (
        lambda f: _write(f / "train/cat" / os.fsdecode(b"\xff\n")),
        [2, 2],
        [2, 2],
        "skipped: 1 file that is no image ('train/cat/\\udcff\\n')\n",
    ),
    "a class without a test folder": (
        _saves("train/ape/1.jpg", "train/elk/1.jpg"),
        [1, 2, 2, 1],
        [0, 2, 2],
        "no test images of: 'ape', 'elk'\n",
    ),
    "a class with an empty test folder": (
        lambda f: _empty(f / "test/cat"),
        [2, 2],
        [0, 2],
        "no test images of: 'cat'\n",
    ),
}


@pytest.mark.parametrize(("change", "train", "test", "said"), COUNTS.values(), ids=COUNTS)
def test_what_counts_and_what_is_said(
    change: Change, train: list[int], test: list[int], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    assert demo._folder(str(folder)) == folder
    assert capsys.readouterr().out == ""
    for _ in "decoded", "from the cache":
        assert _counts(_load(folder)) == (train, test)
        assert capsys.readouterr().out == said
    _load(folder, tell=False)
    assert capsys.readouterr().out == ""


LAYOUTS: dict[str, tuple[Change, str]] = {
    "empty class": (
        _all(lambda f: (f / "train/elk").mkdir(), lambda f: (f / "test/elk").mkdir()),
        "DIR/train/elk: no image (.jpg, .jpeg, .png) directly in it: add images or remove the folder",
    ),
    "class with a nested folder only": (
        _saves("train/ape/images/1.jpg"),
        "DIR/train/ape: no image (.jpg, .jpeg, .png) directly in it: add images or remove the folder",
    ),
    "unknown class": (
        _saves("test/Cat/1.jpg", "test/elk/1.jpg"),
        "DIR/test has 'Cat', 'elk', not among the classes of DIR/train ('cat', 'dog'): add, rename or remove it",
    ),
    "no images to test": (
        _all(lambda f: _empty(f / "test/cat"), lambda f: _empty(f / "test/dog")),
        "DIR has no test/CLASS/*.jpg (or .jpeg, .png) in it",
    ),
    "no train folder": (
        lambda f: (f / "train").rename(f / "training"),
        "DIR has no train/CLASS/*.jpg (or .jpeg, .png) in it",
    ),
    "train is a file": (
        _all(lambda f: (f / "train").rename(f / "training"), lambda f: _write(f / "train")),
        "DIR has no train/CLASS/*.jpg (or .jpeg, .png) in it",
    ),
    "broken link to a class": (
        lambda f: (f / "train/elk").symlink_to(f / "nowhere"),
        "DIR/train/elk cannot be listed (No such file or directory): mend or remove it",
    ),
}


@pytest.mark.parametrize(("change", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_folder_of_another_layout_is_refused(
    change: Change, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line in a sentence."""
    change(folder)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('DIR', str(folder)))}$"):
        _load(folder)
    with pytest.raises(SystemExit, match="^2$"):
        _parse("--data", str(folder))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "demo: error: argument --data: " + message.replace("DIR", str(folder))


def _parse(*arguments: str) -> Namespace:
    return demo.parser("demo", "", "workers", {"a": 0.1, "b": 0.2, "c": 0.3}).parse_args(arguments)


def _cut(path: Path, share: float, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, kind)
    os.truncate(path, int(path.stat().st_size * share))


def _bomb(path: Path) -> None:
    """A PNG that says it has 10⁸ × 10⁸ pixels."""
    _save(path)
    whole, header = path.read_bytes(), b"IHDR" + (10**8).to_bytes(4) * 2 + b"\x08\2\0\0\0"
    _write(path, whole[:12] + header + PngImagePlugin._crc32(header).to_bytes(4) + whole[33:])


FAULTS: dict[str, tuple[Change, str]] = {
    "web page": (lambda p: _write(p, "<html>404</html>"), "cannot identify image file .*"),
    "empty": (_write, "it is empty"),
    "truncated JPEG": (lambda p: _cut(p, 0.5, "JPEG"), "image file is truncated .*"),
    "truncated PNG": (lambda p: _cut(p, 0.5, "PNG"), "image file is truncated"),
    "header only": (lambda p: _cut(p, 0.001, "PNG"), "cannot identify image file .*"),
    "bomb": (_bomb, "Image size .* could be decompression bomb DOS attack."),
    "broken link": (lambda p: p.symlink_to("nowhere"), "No such file or directory: .*/nowhere"),
    "link to itself": (lambda p: p.symlink_to(p), "Too many levels of symbolic links: .*"),
    "folder": (lambda p: p.mkdir(), "it is a folder"),
    "link to a folder": (lambda p: p.symlink_to(p.parent), "it is a folder"),
    "pipe": (os.mkfifo, "it is no regular file"),
    "floats": (lambda p: Image.new("F", SIZE).save(p, "TIFF"), "its pixels of mode F are not of 8 or 16 bits"),
}


@pytest.mark.parametrize("name", ["train/cat/9.jpg", "test/dog/9.PNG"])
@pytest.mark.parametrize(("change", "reason"), FAULTS.values(), ids=FAULTS)
def test_an_image_that_cannot_be_read_is_named(change: Change, reason: str, name: str, folder: Path) -> None:
    """It leaves nothing in the cache."""
    change(folder / name)
    path = re.escape(str(folder / name))
    with pytest.raises(ValueError, match=f"^{path} cannot be read as an image \\({reason}\\): mend or remove it$"):
        _load(folder)
    assert not list(folder.parent.glob("cache/*"))


@pytest.mark.parametrize(("part", "size"), [("train", (4, 6)), ("test", (7, 4)), ("test", (6, 5))])
def test_images_of_different_size_are_named(part: str, size: tuple[int, int], folder: Path) -> None:
    """The test images are compared with the training images too."""
    for path in folder.glob(f"{part}/dog/*"):
        _save(path, size=size)
    text = f"{folder}/{part}/dog/10.jpg is shown with {size[0]}×{size[1]} pixels, {folder}/train/cat/10.jpg with 6×4: "
    with pytest.raises(ValueError, match=f"^{re.escape(text)}resize all to one size$"):
        _load(folder)


GREY16 = Image.fromarray(np.full((4, 6), 40000, np.uint16))
RED = Image.new("RGB", SIZE, (200, 30, 30))
PIXELS: dict[str, tuple[Image.Image, str, dict[str, Any], tuple[int, int, int]]] = {
    "RGB": (RED, "PNG", {}, (200, 30, 30)),
    "grey": (Image.new("L", SIZE, 90), "JPEG", {}, (90, 90, 90)),
    "grey of 16 bits": (GREY16, "PNG", {}, (156, 156, 156)),
    "black and white": (Image.new("1", SIZE, 1), "PNG", {}, (255, 255, 255)),
    "palette": (RED.quantize(2), "PNG", {}, (200, 30, 30)),
    "palette with alpha": (RED.quantize(2), "PNG", {"transparency": b"\x80\0"}, (200, 30, 30)),
    "grey with alpha": (Image.new("LA", SIZE, (90, 9)), "PNG", {}, (90, 90, 90)),
    "RGB with alpha": (Image.new("RGBA", SIZE, (200, 30, 30, 0)), "PNG", {}, (200, 30, 30)),
    "CMYK": (Image.new("CMYK", SIZE, (255, 0, 255, 0)), "JPEG", {}, (0, 255, 0)),
}


@pytest.mark.parametrize(("image", "kind", "options", "colour"), PIXELS.values(), ids=PIXELS)
@pytest.mark.filterwarnings("error")
def test_all_modes_become_rgb(
    image: Image.Image, kind: str, options: dict[str, Any], colour: tuple[int, int, int], folder: Path
) -> None:
    image.save(folder / "train/cat/0.jpg", kind, **options)
    pixels = _load(folder).train_images[0].astype(int)
    assert pixels.dtype == int
    assert abs(pixels - np.array(colour)[:, None, None]).max() <= (kind == "JPEG")


@pytest.mark.parametrize(
    ("orientation", "bright"),
    [
        (1, np.s_[:, :8]),
        (2, np.s_[:, 8:]),
        (3, np.s_[:, 8:]),
        (4, np.s_[:, :8]),
        (5, np.s_[:8]),
        (6, np.s_[:8]),
        (7, np.s_[8:]),
        (8, np.s_[8:]),
    ],
)
def test_images_stand_upright(orientation: int, bright: Any, folder: Path) -> None:
    """The left half is white as stored; bright is where viewers show it."""
    stored = np.zeros((8, 16), np.uint8)
    stored[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.zeros((16, 8) if orientation > 4 else (8, 16), bool)
    shown[bright] = True
    for path in folder.glob("*/*/*.jpg"):
        Image.fromarray(stored).save(path, "JPEG", exif=exif)
    data = _load(folder)
    assert data.test_images.shape == (4, 3, *shown.shape)
    assert np.array_equal(data.train_images > 127, np.broadcast_to(shown, data.train_images.shape))


def _rewrite_unnoticed(path: Path) -> None:
    """Other pixels, same size, same time of modification."""
    before = path.stat()
    Image.new("RGB", SIZE, (30, 30, 30)).save(path, "PNG")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


CHANGES: dict[str, tuple[Change, list[int], list[int]]] = {
    "added": (lambda f: _save(f / "train/cat/15.jpg", 15), [10, 15, 20, 10, 20], [0, 0, 0, 1, 1]),
    "removed": (lambda f: (f / "train/cat/10.jpg").unlink(), [20, 10, 20], [0, 1, 1]),
    "renamed": (lambda f: (f / "train/cat/10.jpg").rename(f / "train/cat/30.jpg"), [20, 10, 10, 20], [0, 0, 1, 1]),
    "moved": (lambda f: (f / "train/cat/10.jpg").rename(f / "train/dog/9.jpg"), [20, 10, 20, 10], [0, 1, 1, 1]),
    "rewritten": (lambda f: _save(f / "train/cat/10.jpg", 30), [30, 20, 10, 20], [0, 0, 1, 1]),
    "rewritten unnoticed": (lambda f: _rewrite_unnoticed(f / "train/cat/10.jpg"), [30, 20, 10, 20], [0, 0, 1, 1]),
    "linked elsewhere": (
        _all(
            lambda f: (f / "train/cat/10.jpg").unlink(),
            lambda f: (f / "train/cat/10.jpg").symlink_to(f / "test/cat/20.jpg"),
        ),
        [20, 20, 10, 20],
        [0, 0, 1, 1],
    ),
    "link in another class, at the same place": (
        _all(
            _saves("aside/1.jpg", "train/elk/30.jpg"),
            lambda f: (f / "train/dog/25.jpg").symlink_to(f / "aside/1.jpg"),
            _load,
            lambda f: (f / "train/dog/25.jpg").rename(f / "train/elk/25.jpg"),
        ),
        [10, 20, 10, 20, 0, 0],
        [0, 0, 1, 1, 2, 2],
    ),
    "class renamed": (
        lambda f: [(f / p / "cat").rename(f / p / "fox") for p in ("train", "test")],
        [10, 20, 10, 20],
        [0, 0, 1, 1],
    ),
    "class added": (lambda f: _save(f / "train/ape/1.jpg", 1), [1, 10, 20, 10, 20], [0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize(("change", "shades", "labels"), CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_decoded_anew(change: Change, shades: list[int], labels: list[int], folder: Path) -> None:
    """And takes the place of what was kept of it."""
    _load(folder)
    kept = list(folder.parent.glob("cache/*"))
    change(folder)
    data = _load(folder)
    assert data.train_images[:, 0, 0, 0].tolist() == shades
    assert data.train_labels.tolist() == labels
    assert len(list(folder.parent.glob("cache/*"))) == 1
    assert list(folder.parent.glob("cache/*")) != kept
    _assert_same(_load(folder), data)


def test_an_unchanged_folder_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is spelt, and whatever is in it that does not count."""
    before = _load(folder)
    monkeypatch.setattr(images, "pixels", None)
    monkeypatch.chdir(folder)
    _write(folder / "train/cat/.DS_Store")
    for spelling in (folder, Path(), folder / ".." / "data"):
        _assert_same(demo.load(spelling, folder.parent / "cache"), before)


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_broken_cache_is_written_anew(size: int, folder: Path) -> None:
    before = _load(folder)
    (kept,) = folder.parent.glob("cache/*")
    whole = kept.stat().st_size
    os.truncate(kept, size)
    assert np.array_equal(_load(folder).train_images, before.train_images)
    assert kept.stat().st_size == whole > 1000


def test_a_cache_holds_several_folders_and_only_what_it_wrote_is_removed(folder: Path) -> None:
    _load(folder)
    _write(folder.parent / "cache/images-mine.npz")
    second = folder.parent / "second"
    for part in ("train", "test"):
        _save(second / part / "cat/1.jpg", 99)
    _load(second)
    _save(second / "train/cat/2.jpg", 98)
    assert _load(second).train_images[:, 0, 0, 0].tolist() == [99, 98]
    assert len(list(folder.parent.glob("cache/*"))) == 3
    assert _load(folder).train_images[:, 0, 0, 0].tolist() == [10, 20, 10, 20]


def test_workers_may_load_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more load, save and clean up while the first has not yet given its file the final name."""
    save, written = np.savez, list[Path]()

    def save_among_others(path: Path, *arrays: Any) -> None:
        save(path, *arrays)
        written.append(path)
        if len(written) < 3:
            _load(folder)

    monkeypatch.setattr(np, "savez", save_among_others)
    first = _load(folder)
    assert len(set(written)) == 3
    assert len(list(folder.parent.glob("cache/*"))) == 1
    _assert_same(_load(folder), first)
    assert len(written) == 3


def test_the_help_says_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        _parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "folder with train/CLASS/*.jpg and test/CLASS/*.jpg (or .jpeg, .png), images of one size" in words
