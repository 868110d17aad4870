"""The notebook: trains, is interrupted, resumes, stops early, shows its history and predicts."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EDITED = """
import flax.linen as nn

class Edited(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(6)(FACTOR * image.reshape(len(image), -1))

few = Config(dataset=(*make(40, 2), *make(20, 3)), num_epochs=1, batch_size=20, model=Edited(), validation_fraction=0.0)
_ = train_and_evaluate(few, run_dir="runs/edited", resume="auto", report=Report())
"""
NOTEBOOK = Path(__file__).parents[1] / "experiments" / "notebook.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The outputs of the code cells, {kind: text}; then of the cell that resumes, run again, and of an edited one."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # In the repository it has none.
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    client = NotebookClient(notebook, timeout=100, kernel_name="python3", resources=resources)
    with client.setup_kernel():
        found = [text_of(client.execute_cell(cell, notebook.cells.index(cell))) for cell in code]
        found.append(text_of(client.execute_cell(code[3], notebook.cells.index(code[3]))))
        for factor in ("1", "2"):
            notebook.cells.append(nbformat.v4.new_code_cell(EDITED.replace("FACTOR", factor)))
            found.append(text_of(client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)))
    return found


def text_of(cell):
    found = {"stdout": "", "stderr": "", "display": "", "result": ""}
    for output in cell.outputs:
        if output.output_type == "stream":
            found[output.name] += output.text
        else:
            kind = {"display_data": "display", "execute_result": "result"}[output.output_type]
            found[kind] += output.data["text/plain"]
    return found


def test_an_interrupt_saves_and_running_the_cell_again_resumes(cells):
    interrupted, resumed, again = cells[2], cells[3], cells[-3]
    assert "Stopped by SIGINT; the checkpoint of step 60 is saved." in interrupted["stdout"]
    assert re.findall(r"epoch +(\d+)/12", interrupted["stdout"]) == ["1"]
    assert "resuming at step 60 of 516" in resumed["stdout"]
    epochs = re.findall(r"epoch +(\d+)/12", resumed["stdout"])
    assert epochs == [str(2 + i) for i in range(len(epochs))] and len(epochs) < 11  # It stops early.
    name = r"Run\(runs/shapes: cnn on arrays in memory, seed 0, "
    assert re.fullmatch(rf"{name}test accuracy 9\d\.\d+% after {epochs[-1]} epochs\)", resumed["result"])
    assert again["result"] == resumed["result"]  # Nothing is left to do.
    assert again["stdout"].startswith("class ") and resumed["stdout"].endswith(again["stdout"])


def test_progress_is_one_line_that_is_updated(cells):
    for cell in cells[2:4]:
        assert re.fullmatch(r"epoch \d+/12 ━.* \d+/516 loss \d\.\d+ .*images/s.*", cell["display"])
        assert cell["stderr"] == ""


def test_history_and_predictions_are_printed(cells):
    history, predictions, features = (cell["stdout"] for cell in cells[4:7])
    accuracy = re.search(r"test accuracy (\d+\.\d\d)", cells[3]["result"])
    right = re.search(r"(\d+\.\d)% of the test images are right, (\d+) of 300 wrong", predictions)
    assert accuracy is not None and right is not None
    assert float(right[1]) == pytest.approx(float(accuracy[1]), abs=0.06)
    assert int(right[2]) == round(300 * (1 - float(accuracy[1]) / 100))
    assert history.startswith("epoch 1  training loss ")
    assert "its nearest neighbours are ['" in features


def test_code_that_was_edited_in_a_cell_is_noticed(cells):
    assert "changed" not in cells[-2]["stdout"]
    assert "Edited in a cell changed after this run had finished, so this is its old result." in cells[-1]["stdout"]
