from pathlib import Path

import pytest
from rich.cells import cell_len

from cnnjax.class_scores import class_scores, confusion_matrix
from cnnjax.process.tables import class_lines, printable, rate, table


def test_columns_are_aligned_in_every_script_and_controls_are_escaped():
    rows = [["run", "x"], ["名前", "1"], ["é\n\x1b[31m", "2"], ["caf\u0065\u0301 a", ""], ["\udcff", "3"]]
    assert [*table(rows)] == [
        "run          x",
        "名前         1",  # Each takes two columns.
        "é\\n\\x1b[31m  2",
        "cafe\u0301 a",
        "\\udcff       3",
    ]
    assert printable(Path("a b/ü")) == "a b/ü"


def lines_of(confusion, names):
    found = class_scores(confusion, len(names))
    return [*class_lines(found.rows(names), confusion_matrix(confusion, len(names)), found.means(), "There are all.")]


def test_the_classes_have_a_table_and_a_confusion_matrix():
    assert lines_of({(0, 0): 1198, (0, 2): 2, (2, 0): 1, (2, 2): 3}, ("cat", "犬", "a\nb")) == [
        "class        images  precision  recall      F1",
        "0      cat    1,200     99.92%  99.83%  99.87%",
        "1      犬         0      0.00%    none    none",  # It has no images.
        "2      a\\nb       4     60.00%  75.00%  66.67%",
        "mean                    79.96%  87.42%  83.27%",  # Of the two classes with images.
        "Images of each class (rows), by predicted class (columns):",
        "class           0  1  2",
        "0      cat   1198  0  2",
        "1      犬       0  0  0",
        "2      a\\nb     1  0  3",
    ]


def test_a_rate_has_two_significant_digits():
    assert [*map(rate, (0.0, 0.0123, 3.14, 9.9, 10.4, 12345.6))] == ["0", "0.012", "3.1", "9.9", "10", "12,346"]


@pytest.mark.parametrize("name", ["word " * 20, "長" * 60], ids=["words", "wide"])
def test_ten_classes_with_long_names_fit_into_100_columns(name):
    lines = lines_of({(i, j): 10**5 - 10 * i - j for i in range(10) for j in range(10)}, [name] * 10)
    assert len(lines) == 12 + 1 + 11
    assert max(map(cell_len, lines)) <= 100
    assert all("…" in line for line in lines if line[0].isdigit())


def test_of_many_classes_those_with_the_lowest_recall_are_shown():
    confusion = {(k, k): k for k in range(1, 21)} | {(k, 21): 100 - k for k in range(21)}  # 21 has no images.
    lines = lines_of(confusion, [f"name{k}" for k in range(22)])
    assert [line.split()[:2] for line in lines[1:11]] == [[str(k), f"name{k}"] for k in range(10)]
    assert lines[11].startswith("mean ")
    assert lines[12:] == ["These are the 10 of 22 classes with the lowest recall. There are all."]
    assert len(lines_of({(k, k): 1 for k in range(21)}, [f"name{k}" for k in range(21)])) == 13
    assert len(lines_of({(k, k): 1 for k in range(20)}, [f"name{k}" for k in range(20)])) == 22  # No matrix.
