import errno
import io
import subprocess
import sys

import pytest

from cnnjax.process.streams import Output, OutputError, guarded_streams, quote


class Tee:
    """A stream that has no method but `write`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"2\xd73 \u732b \udcff"), ("latin-1", r"2×3 \u732b \udcff"), ("utf-8", r"2×3 猫 \udcff")],
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding, shown):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding)
    print("2×3 猫 \udcff", file=Output(stream), flush=True)
    assert file.getvalue().decode(encoding) == shown + "\n"


def test_a_stream_needs_only_write_and_may_be_missing_or_closed():
    tee, closed = Tee(), io.StringIO()
    closed.close()
    for stream in (tee, None, closed):
        output = Output(stream)
        print("a line", file=output, flush=True)
        assert (output.isatty(), output.encoding) == (False, "utf-8")
    assert tee.text == "a line\n"


def test_the_first_error_is_reported_and_the_rest_is_dropped():
    errors = []
    output = Output(Broken(), errors.append)
    print("a line", file=output)
    print("a line", file=output)
    assert [type(error) for error in errors] == [BrokenPipeError]


def test_standard_output_fails_once_and_standard_error_never(monkeypatch):
    streams = Broken(), Broken()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with guarded_streams():
        with pytest.raises(OutputError, match="Broken pipe") as raised:
            print("a line")
        assert raised.value.errno == errno.EPIPE
        print("a line")
        print("a line", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == streams


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    program = (
        "import os, pathlib, sys; from cnnjax.process.streams import guarded_streams\n"
        "with guarded_streams():\n"
        "    print('lost'); print('lost', file=sys.stderr)\n"
        "    with open('file', 'w') as file: file.write(str(file.fileno()))"
    )
    shell = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program]
    subprocess.run(shell, cwd=tmp_path, check=True)
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("text", ["a b", "it's", "n\udcff'\\ é\n", "é"])
def test_a_quoted_argument_can_be_pasted(text):
    for encoding in ("utf-8", "ascii", None):
        quoted = quote(text, encoding)
        shown = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
        assert shown == text.encode("utf-8", "surrogateescape")
        assert quoted.encode(encoding or "utf-8")
