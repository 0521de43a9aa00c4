"""Which machine a benchmark ran on: figures of different processors are not to be compared."""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path


def machine() -> str:
    """Return the processor and its cores, such as "AMD EPYC (family 23, model 1), 2 cores"."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux alone has it
        said = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        if "model name" in said:
            name = f"{said['model name']} (family {said['cpu family']}, model {said['model']})"
    return f"{name}, {os.cpu_count()} cores"
