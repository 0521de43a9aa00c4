"""Every benchmark can be imported: their runs are rare, and names of the package move."""

from importlib import import_module

import pytest

from benchmarks.report import ROOT

MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("benchmarks/**/*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_it_imports(name: str) -> None:
    import_module(name)
