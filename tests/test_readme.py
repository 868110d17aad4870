import re
from pathlib import Path

import pytest

from cnnjax.data.named import NAMED_SETS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_lines_for_researchers_run_as_they_stand(prepared_dir, tmp_path, monkeypatch, capsys):
    """On generated images of Fashion-MNIST's shape: the pinned digest of the real ones is off for this test."""
    (tmp_path / "fashion_mnist").symlink_to(prepared_dir / "generated")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(NAMED_SETS["fashion_mnist"].sha256, "train", None)
    monkeypatch.setitem(NAMED_SETS["fashion_mnist"].sha256, "test", None)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["state"].step == 100
    assert re.match(r"step 100: \d+\.\d% of the batch is right", capsys.readouterr().out.splitlines()[-1])
    assert scope["metrics"].correct > 16  # It has learned something: chance is 6.4 of 64, give or take 2.4.


@pytest.mark.parametrize("path", re.findall(r"experiments/\w+\.\w+", README))
def test_the_files_that_it_names_are_there(path):
    assert (Path(__file__).parent.parent / path).exists()
