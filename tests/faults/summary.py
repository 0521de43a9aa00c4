"""The table of faults: how many were injected, how many were survived."""

from collections import Counter
from typing import Any

PROPERTY = "fault"
"""Under which a test notes the kind of a fault, how often it was injected, and how often survived."""


def write_summary(terminalreporter: Any) -> None:
    """Print a line for each kind of fault that was injected in this session."""
    injected, survived = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when == "call":
                for name, value in report.user_properties:
                    if name == PROPERTY:
                        kind, count, good = value
                        injected[kind] += count
                        survived[kind] += good
    if not injected:
        return
    terminalreporter.write_sep("=", "faults")
    terminalreporter.write_line(f"{'fault':<90}{'injected':>10}{'survived':>10}{'lost':>6}")
    for kind, count in sorted(injected.items()):
        terminalreporter.write_line(f"{kind:<90}{count:>10}{survived[kind]:>10}{count - survived[kind]:>6}")
