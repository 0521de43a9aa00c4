"""Every benchmark can be imported: their runs are rare, and names of the package move."""

import os
from importlib import import_module
from unittest import mock

import pytest

from benchmarks.report import ROOT

MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("benchmarks/**/*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_it_imports(name: str) -> None:
    with mock.patch.dict(os.environ):  # some set variables for processes that they start
        assert import_module(name).__doc__, "--help begins with its first line"
