"""Compiles the loops of native.c at first use, and keeps them in the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC"]
"""Without contraction: a fused multiply-add rounds once where NumPy and torch round twice."""

_SOURCE = Path(__file__).with_name("native.c")


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled loops, or None, with a warning, where they cannot be compiled.

    They are kept in the user's cache (``$XDG_CACHE_HOME/signsgd``, else ``~/.cache/signsgd``) by a name that says which
    source, compiler and processor they are of. The compiler is ``$CC``, else ``cc``.
    """
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"") or str(error)
        warnings.warn(
            f"signsgd could not compile its loops and goes on with NumPy's, which take five times as long: install a C "
            f"compiler as cc, or name one in CC ({reason!r})",
            stacklevel=2,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.cast.argtypes = library.apply.argtypes = [pointer, size, size, size, pointer, pointer]
    library.alone.argtypes = [pointer, size, size, size]
    library.verdict.argtypes = [pointer, pointer, size, size, ctypes.c_int32, pointer]
    for function in (library.cast, library.apply, library.alone, library.verdict):
        function.restype = None
    library.displace.argtypes, library.displace.restype = [pointer, pointer, size], ctypes.c_double
    return library


def _compiled() -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    what = [_SOURCE.read_bytes(), " ".join([*compiler, *FLAGS]).encode(), version, _processor().encode()]
    name = f"native-{hashlib.blake2b(b'|'.join(what), digest_size=8).hexdigest()}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signsgd"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:  # many ranks may do it at once
            made = Path(part, name)
            subprocess.run([*compiler, *FLAGS, "-o", made, _SOURCE], check=True, capture_output=True)
            made.replace(folder / name)
    return folder / name


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "|".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(kinds)})])
