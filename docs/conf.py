"""Settings of the documentation: ``sphinx-build -W -b html docs docs/_build``."""

import os
import re
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
with suppress(ImportError):  # before TensorFlow: each holds an LLVM, and only this order works
    import triton._C.libtriton  # noqa: F401

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # the packages beside these pages, whatever is installed

project = "signsgd"
author = "The signsgd authors"
copyright = "The signsgd authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "jupyter_execute"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # a name in single backticks is a link where there is something to link to
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_title = f"signsgd {release}"
html_copy_source = False
html_show_sphinx = False


def copy_pages() -> None:
    """Copy pages that lie elsewhere to where Sphinx finds them: executed notebooks, and the report on the papers."""
    copied = HERE / "_copied"
    copied.mkdir(exist_ok=True)
    pages = {path.name: path.read_text() for path in (ROOT / "tutorials").glob("*.ipynb")}
    report = (ROOT / "benchmarks/papers/README.md").read_text()
    report = report.replace("[`../results/papers`](../results/papers)", "`benchmarks/results/papers`")
    report = report.replace("# The papers, measured again", "# The papers: the whole report", 1)
    pages["papers_report.md"] = report.replace("](../results/", "](../../benchmarks/results/")
    for name, text in pages.items():
        if not (copied / name).exists() or (copied / name).read_text() != text:
            (copied / name).write_text(text)


def to_copies(_app: Any, _name: str, source: list[str]) -> None:
    """Turn links to where these pages lie in the repository into links to their copies, in place."""
    source[0] = source[0].replace("../../benchmarks/papers/README.md", "../_copied/papers_report.md")
    source[0] = re.sub(r"\.\./\.\./tutorials/(\w+\.ipynb)", r"../_copied/\1", source[0])


def to_rst(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Turn a docstring's Markdown tables, fences and links into reStructuredText, in place.

    What follows "Returns:" has no type before a colon, since types are annotations; a colon ahead says so to napoleon.
    """
    out: list[str] = []
    fenced = False
    for number, line in enumerate(lines):
        text = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if text.startswith("```"):
            fenced = not fenced
            out += ["", f"{indent}.. code-block:: text", ""] if fenced else [""]
        elif fenced:
            out.append("   " + re.sub(r"(?<=\S) {3,}", "   ", line))
        elif _is_row(text):
            above = lines[number - 1].strip() if number else ""
            if re.fullmatch(r"\|[-|:]+\|", text):
                continue
            if not _is_row(above):
                out += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            for k, cell in enumerate(_cells(text)):
                out.append(f"{indent}   {'* -' if k == 0 else '  -'} {cell}")
        elif number and lines[number - 1].strip() == "Returns:":
            out.append(f"{indent}: {text}")
        else:
            if number and _is_row(lines[number - 1].strip()):
                out.append("")
            out.append(re.sub(r"\[([^\]`]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", line))
    lines[:] = out


def _is_row(text: str) -> bool:
    return text.startswith("|") and text.endswith("|") and len(text) > 1


def _cells(row: str) -> list[str]:
    """Return the cells of a row; a bar within backticks belongs to its cell."""
    return [cell.strip() for cell in re.findall(r"(?:``[^`]*``|`[^`]*`|[^|])+", row.strip("|"))]


def setup(app: Any) -> None:
    """Copy what is elsewhere before the first page is looked for."""
    copy_pages()
    app.connect("source-read", to_copies)
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
