"""The documentation is built without a warning, and has an entry for each public name and each command."""

import re
import subprocess
import sys
from dataclasses import fields
from html import unescape
from pathlib import Path

import pytest

import cnnjax
from cnnjax.cli.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Builds the documentation, by the command that docs/conf.py names."""
    out = tmp_path_factory.mktemp("docs")
    (options,) = re.findall(r"sphinx-build (.*) build/docs`", (ROOT / "docs" / "conf.py").read_text())
    command = [sys.executable, "-m", "sphinx", "-q", *options.split(), str(out)]
    built = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0 and built.stderr == "", built.stderr
    return out


def test_every_public_name_has_one_entry(pages):
    html = (pages / "docs" / "api.html").read_text()
    entries = re.findall(r'<dt class="sig sig-object py" id="cnnjax\.(\w+)"', html)
    assert sorted(entries) == sorted(cnnjax.__all__)
    described = re.findall(r'id="cnnjax\.Config\.(\w+)"', html)
    assert {*described} >= {field.name for field in fields(cnnjax.Config)}


def test_docstrings_are_converted(pages):
    html = (pages / "docs" / "api.html").read_text()
    text = unescape(re.sub(r"<pre.*?</pre>|<[^>]+>", "", html, flags=re.DOTALL))
    assert "Args:" not in text and "`" not in text
    assert "<cite>" not in html and "system-message" not in html  # Other markup, errors.
    assert "Source: Yun et al." in text and "Raises:" in text


def test_every_command_has_its_help(pages, capsys):
    html = (pages / "docs" / "cli.html").read_text()
    main(["--help"])
    names = re.findall(r"{([\w,-]+)}", capsys.readouterr().out)[0].split(",")
    assert re.findall(r'<section id="([\w-]+)">\n<h2>', html) == names
    assert [name for name in names if f"usage: cnnjax {name}" not in html] == []


def test_it_begins_with_the_readme(pages):
    assert "<h1>cnnjax" in (pages / "index.html").read_text()
