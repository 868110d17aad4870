"""The documentation: README, lesson, results, and a reference that is generated from the program.

The command is `.venv/bin/sphinx-build -n -W --keep-going -c docs . build/docs`. Then open build/docs/index.html.
"""

import contextlib
import io
import os
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

os.environ["COLUMNS"] = "84"  # The width of the command line's help.

import cnnjax
from cnnjax.cli.main import main

ROOT = Path(__file__).parents[1]
# What public functions accept or return, besides the public names.
OTHERS = {
    "cnnjax.network": ["Network"],
    "cnnjax.typing": ["BatchLike"],
    "cnnjax.data.datasets": ["ImageDataset"],
    "cnnjax.data.stored": ["Examples"],
    "cnnjax.metrics": ["Scores"],
    "cnnjax.sharding": ["Placement", "place"],
    "cnnjax.runs.schema": ["DataFacts", "Result", "Row", "Timing"],
    "cnnjax.pretrained": ["Weights"],
    "cnnjax.export.card": ["Checked"],
}
PAGES = [
    "experiments/lesson/lesson",
    "docs/api",
    "docs/cli",
    "experiments/RESULTS",
    "experiments/benchmarks/BENCHMARKS",
    "experiments/benchmarks/CAPACITY",
    "experiments/launch/README",
]

project = "cnnjax"
root_doc = "README"
include_patterns = [f"{page}.md" for page in (root_doc, *PAGES)]
exclude_patterns = [".*", "build", "cnnjax", "data", "runs", "tests"]  # Folders that need not be searched.
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
# Types of other libraries, and private ones, have no entry.
nitpick_ignore_regex = [(r"py:.*", r"(?!cnnjax\.\w+$).*")]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
NAPOLEON: Any = Config(napoleon_use_ivar=True, napoleon_custom_sections=[("Keys", "params_style")])

html_theme = "furo"
html_title = "cnnjax"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False


def api() -> str:
    """Returns the entries of the public names, grouped and described as in the README's table."""
    table = (ROOT / "README.md").read_text().split("## The public interface")[1].split("\n## ")[0]
    text = ""
    for row in re.findall(r"^\| (`.*`) \| (.*) \|$", table, re.MULTILINE):
        names = re.findall(r"`(\w+)`", row[0])
        text += f"## {', '.join(names)}\n\n{row[1][0].upper()}{row[1][1:]}.\n\n"
        text += "".join(entry("cnnjax", name) for name in names)
    return text


def other_types() -> str:
    """Returns the entries of the other types."""
    private = [(module, name) for module, names in OTHERS.items() for name in names if name not in cnnjax.__all__]
    return "".join(entry(*where) for where in private)


def entry(module: str, name: str) -> str:
    """Returns the directive that generates the entry of a class or a function."""
    value = getattr(import_module(module), name)
    directive = f".. autofunction:: {module}.{name}\n"
    if isinstance(value, type):
        directive = f".. autoclass:: {module}.{name}\n   :members:\n"
        directive += "   :show-inheritance:\n" * (value.__base__ not in (object, dict, tuple))
        directive += f"   :exclude-members: {', '.join(getattr(value, '_fields', ()))}\n"
    return f"```{{eval-rst}}\n{directive}```\n\n"


def commands() -> str:
    """Returns the help of every command."""
    (names,) = re.findall(r"{([\w,-]+)}", help_of())
    return "".join(f"## {name}\n\n```text\n{help_of(name)}```\n\n" for name in names.split(","))


def help_of(*command: str) -> str:
    """Returns what `cnnjax COMMAND --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


def complete(app: Any, page: str, source: list[str]) -> None:
    """Adds what is generated to the source of a page, and the list of pages to the README."""
    if page == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"
    source[0] = re.sub(
        r"\[(.*?)\]\(([\w/]+)\)", lambda link: link[1] if (ROOT / link[2]).is_dir() else link[0], source[0]
    )
    for mark, make in (("{{ names }}", api), ("{{ other types }}", other_types), ("{{ commands }}", commands)):
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


def convert(app: Any, what: str, name: str, value: Any, *args: Any) -> None:
    """Converts a docstring in Google's style; its `code` becomes code, or a link if it is a public name."""

    def markup(match: re.Match[str]) -> str:
        return f":py:obj:`~cnnjax.{match[1]}`" if match[1] in cnnjax.__all__ else f"``{match[1]}``"

    options, lines = args
    what = "class" if what == "class" else "method"  # The docstring of a field has no type before a colon.
    converted = GoogleDocstring(lines, NAPOLEON, app, what, name, value, options).lines()
    lines[:] = [re.sub(r"(?<![`:])`([^`]+)`(?!`)", markup, line) for line in converted]


def shorten(app: Any, what: str, name: str, value: Any, *args: Any) -> tuple[str | None, str | None] | None:
    """Shortens a signature: `Array` is that of JAX, and the many fields of a class follow anyway."""
    _, arguments, returns = args
    if arguments is None:
        return None
    if what == "class" and len(arguments) > 150:
        return "", returns
    return arguments.replace("jaxlib._jax.", ""), returns and returns.replace("jaxlib._jax.", "")


def setup(app: Any) -> None:
    """Connects the functions above."""
    app.connect("env-get-outdated", lambda *args: [root_doc, "docs/api", "docs/cli"])  # Parts of them are generated.
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", shorten)
    app.connect("build-finished", lambda app, error: shutil.copy(app.outdir / "README.html", app.outdir / "index.html"))
