"""Writes reports."""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from cnnjax.errors import check, option
from cnnjax.files import atomic_write
from cnnjax.runs.run import Run

TEMPLATES = Path(__file__).parent / "templates"
# The sections of a page, and the entry of its content without which each is missing.
SECTIONS = {
    "result": ("Result", "title"),
    "curves": ("Learning curves", "curves"),
    "classes": ("Classes", "result"),
    "calibration": ("Calibration", "calibration"),
    "examples": ("Mistakes", "calibration"),
    "network": ("Network", "layers"),
    "differences": ("Differences", "num_pairs"),
    "runs": ("Runs", "runs"),
    "record": ("Record", "config"),
}


def write_report(
    runs: Run | Sequence[Run],
    path: str | os.PathLike[str] | None = None,
    *,
    figures: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    experiment: str | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes a report on a run, or on several, as one HTML file that loads nothing from the network.

    The same runs give the same file, except for rounding: right after training, the probabilities are those of the test
    score; later they are computed again, in batches of another size. The page lacks what cannot be computed, such as
    the calibration of a run whose test images are gone, and says so.

    Example:
      >>> write_report(load_run("runs/mnist_mlp-seed0"))
      PosixPath('runs/mnist_mlp-seed0/report.html')

    Args:
      runs: the runs. Those that differ only in their seed are shown as one group.
      path: the .html file, in a folder that is created if it is missing; report.html in the directory of a single run,
        otherwise in the working directory, if None.
      figures: a folder that receives every chart as an SVG file.
      data_dir: the tfds directory; tfds's default if None.
      experiment: the experiment file that the command to reproduce a run names, if the run needs one; that of the
        command that trained it if None.
      warn: receives a line for each part that is missing.

    Returns:
      The path of the file.

    Raises:
      UserError: there is no run, one is given twice, a file of a run is damaged, `path` is a folder or not .html, or a
        folder cannot be written.
      OSError: the file cannot be written.
    """
    runs = [runs] if isinstance(runs, Run) or not isinstance(runs, Iterable) else [*runs]
    kinds = ", ".join(dict.fromkeys(type(run).__name__ for run in runs))
    check("runs", "Runs, such as `load_run(run_dir)`", all(isinstance(run, Run) for run in runs), kinds)
    check("runs", "at least one run", len(runs) > 0, "none")
    path = Path(os.path.expanduser(path)) if path else (runs[0].run_dir if len(runs) == 1 else Path()) / "report.html"
    data_dir = None if data_dir is None else Path(data_dir)
    folders = [run.run_dir.resolve() for run in runs]
    check("runs", "different runs", len({*folders}) == len(folders), " and ".join(str(run.run_dir) for run in runs))
    check("path", "a file", not path.is_dir(), f"the folder {path}")
    check("path", "an .html file", path.suffix.lower() in (".html", ".htm"), path)  # It replaces what is there.
    folder = None if figures is None else Path(os.path.expanduser(figures))
    needed = {"path": (path, path.parent)} | ({} if folder is None else {"figures": (folder, folder)})
    for name, (given, parent) in needed.items():  # Now, and not after minutes of computation.
        writable = False
        with suppress(OSError):
            parent.mkdir(parents=True, exist_ok=True)
            writable = os.access(parent, os.W_OK | os.X_OK)
        rule = "a file in a folder that can be written" if name == "path" else "a folder that can be written"
        check(name, rule, writable, f"{given}. Choose another: {option(name, 'PATH')}")
    if len(runs) == 1:
        from cnnjax.report.single import run_content

        template, (content, charts) = "run.html", run_content(runs[0], data_dir, experiment, warn)
    else:
        from cnnjax.report.several import several_content

        template, (content, charts) = "runs.html", several_content(runs)
    page = render(template, content)
    with atomic_write(path, shared=True) as file:
        file.write(page.encode(errors="backslashreplace"))
    if folder is not None:
        write_figures(charts, folder)
    return path


def render(template: str, content: dict[str, Any]) -> str:
    """Returns the HTML of a page. Every string in `content` is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    scripts = [_library(), (TEMPLATES / "page.js").read_text()]
    hashes = " ".join(f"'sha256-{_base64_sha256(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    return environment.get_template(template).render(
        **content,
        css=(TEMPLATES / "page.css").read_text(),
        library=scripts[0],
        script=scripts[1],
        policy=policy,
        sections=[(id_, title) for id_, (title, entry) in SECTIONS.items() if content.get(entry)],
    )


@cache
def _library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed, once for all charts; vl-convert takes a second to pack them."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", r"<\/script")


def _base64_sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_figures(charts: dict[str, Any], folder: Path) -> None:
    """Writes each chart as an SVG file into an existing folder."""
    for name, chart in charts.items():
        with atomic_write(folder / f"{name}.svg", shared=True) as file:
            file.write(svg(chart, name.replace("_", " ")).encode())


def svg(chart: Any, description: str) -> str:
    """Returns a chart as the content of an SVG file, in the colors of the light mode."""
    from cnnjax.report.charts import configured, to_svg

    css = (TEMPLATES / "page.css").read_text()
    colors = dict(re.findall(r"(--[\w-]+): (#\w+)", css.partition("@media")[0]))
    return to_svg(configured(chart, description).properties(background="var(--surface)"), colors)
