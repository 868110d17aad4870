import pytest

from cnnjax import Config, UserError, load_dataset, load_run, train_and_evaluate
from cnnjax.errors import for_reader, messages_for_shell, option


def test_messages_name_arguments_in_python_and_options_in_a_shell():
    def words():
        return option("run_dir", "DIR"), option("resume"), for_reader("`run`", "`run_dir`")

    in_python = "run_dir=DIR", "resume=True", "`run_dir`"
    assert words() == in_python
    with messages_for_shell():
        assert words() == ("--run-dir DIR", "--resume", "`run`")
    assert words() == in_python


@pytest.mark.parametrize(
    ("use", "python", "shell"),
    [
        (lambda path: train_and_evaluate(Config(), run_dir=path), "Choose another: run_dir=DIR.", "--run-dir DIR."),
        (load_run, "`run_dir` must be the directory of a run", "`run` must be the directory of a run"),
        (lambda path: load_dataset("mnist", path / "x"), "choose another one: data_dir=DIR.", "--data-dir DIR."),
    ],
    ids=["train_and_evaluate", "load_run", "load_dataset"],
)
def test_both_kinds_of_users_get_their_message(use, python, shell, tmp_path):
    (tmp_path / "x").write_text("")
    for expected, other in ((python, shell), (shell, python)):
        with pytest.raises(UserError) as error:
            if expected == shell:
                with messages_for_shell():
                    use(tmp_path)
            else:
                use(tmp_path)
        assert expected in str(error.value) and other not in str(error.value)
