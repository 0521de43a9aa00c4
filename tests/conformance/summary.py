"""The conformance summary: front ends x cases, how many compared with `==`, how many skipped and why."""

from collections import Counter
from typing import Any

PROPERTY = "conformance"
"""Under which a test notes the front end that it compares."""

UNDECIDED = "undecided"
"""Under which it notes how many entries of polar factors rounding decided, and of how many."""


def write_summary(terminalreporter: Any) -> None:
    """Print a line for each front end of which a case was compared in this session."""
    outcomes, entries = Counter[tuple[str, str]](), Counter[tuple[str, int]]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            noted = dict(report.user_properties)
            name = noted.get(PROPERTY)
            if name is not None and report.when == "call":
                outcomes[name, outcome] += 1
                for k, count in enumerate(noted.get(UNDECIDED, ())):
                    entries[name, k] += count
    if not outcomes:
        return
    from .cases import SHAPES, STEPS, cases  # torch and TensorFlow are not imported for a session without conformance
    from .front_ends import FRONT_ENDS

    write = terminalreporter.write_line
    terminalreporter.write_sep("=", f"conformance: {len(FRONT_ENDS)} front ends, every pair of options")
    write(f"each case: {STEPS} steps of {len(SHAPES)} tensors, every worker compared with signsgd_core.Reference by ==")
    write("undecided: the share of matrices' entries in which rounding may turn the verdict; they are not compared")
    write(f"{'front end':<26}{'== compared':>12}{'different':>11}{'not run':>9}{'undecided':>11}")
    for end in FRONT_ENDS:
        reasons = {reason for case in cases() if (reason := end.skips(case)) is not None}
        equal, different = outcomes[end.name, "passed"], outcomes[end.name, "failed"]
        share = f"{entries[end.name, 0] / entries[end.name, 1]:.2%}" if entries[end.name, 1] else ""
        write(f"{end.name:<26}{equal:>12}{different:>11}{len(end.cases) - equal - different:>9}{share:>11}")
        for reason in sorted(reasons):
            write(f"{'':>9} skips some: {reason}")
        for tensor, reason in end.without.items():
            write(f"{'':>9} without tensor {tensor} of shape {SHAPES[tensor]}: {reason}")
