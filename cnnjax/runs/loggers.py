"""Loggers, which record a run elsewhere: their base class, the class that calls them, and the values they record."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.compiler import jit
from cnnjax.config import Config, word
from cnnjax.errors import UserError, check, describe, for_reader, option
from cnnjax.fields import check_methods
from cnnjax.files import flatten
from cnnjax.optim.optimizer import Optimizer
from cnnjax.process.signals import Stop
from cnnjax.runs.codec import encode
from cnnjax.runs.schema import Result
from cnnjax.state import TrainState, copy_state

if TYPE_CHECKING:
    from cnnjax.runs.run import Run

FOLDERS = ("tensorboard", "wandb", "mlflow")  # In the run directory.


class Logger:
    """Records a run elsewhere: the base class of loggers, whose methods do nothing.

    A logger does not change the result. An exception in `start` ends the run before its first step; one in another
    method is reported once, and the run continues without the logger. A subclass in an experiment file that can be made
    without arguments can be named with --log.

    Example:
      >>> class Csv(Logger):
      ...     def start(self, run, step):
      ...         self.file = open(run.run_dir / "loss.csv", "a")
      ...
      ...     def on_step(self, step, metrics):
      ...         print(step, metrics["loss"], sep=",", file=self.file)
      ...
      ...     def finish(self, result):
      ...         self.file.close()
      >>> train_and_evaluate(config, loggers=[Csv()])

    Attributes:
      libraries: names of modules that are imported before `start`, which a signal interrupts, unlike an import.
    """

    libraries: tuple[str, ...] = ()

    def start(self, run: "Run", step: int) -> None:
        """Begins a session of a run.

        Args:
          run: has `run_dir`, `config` and `facts`, and no result yet.
          step: the number of steps that are done, above 0 in a resumed run. The later steps are reported, some of them
            for the second time.
        """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Receives the means over a batch, see `on_step` of `train_and_evaluate`, and the "learning_rate"."""

    def on_epoch(self, row: dict[str, Any], state: TrainState) -> None:
        """Receives the values of an epoch, see `on_epoch` of `train_and_evaluate`; `state` is a copy.

        `row` also contains the "learning_rate" of its last step.
        """

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Ends the session.

        Args:
          result: the content of result.json, or None if the run was stopped or failed.
        """


class Loggers:
    """Calls the loggers of a run. One that fails is reported and left out: training costs more than its log.

    Args:
      loggers: are started by `started`.
      say: receives the reports; None: they are warnings of Python.

    Attributes:
      active: the loggers that have started and have not failed.
    """

    def __init__(self, loggers: Sequence[Logger] = (), say: Callable[[str], None] | None = None):
        self.active: list[Logger] = []
        self._loggers, self._say = loggers, say or _warn
        self._result: Result | None = None
        self._learning_rates = np.zeros(1, np.float32)
        self._accumulate_steps = 1

    @contextmanager
    def started(self, run: "Run", step: int, num_steps: int, stop: Stop) -> Iterator[None]:
        """Starts the loggers, and finishes them at the end of the context.

        Args:
          num_steps: of the whole run.
          stop: receives signals, which interrupt a start, such as the search for a server.

        Raises:
          UserError: one could not start.
          KeyboardInterrupt: of `finish`; all loggers are finished nevertheless.
        """
        if self._loggers:
            optim, self._accumulate_steps = run.config.optim, run.config.optim.accumulate_steps
            rates = make_learning_rates(optim=optim, num_updates=num_steps // self._accumulate_steps)
            self._learning_rates = np.asarray(rates)
        try:
            for logger in self._loggers:
                try:
                    for name in logger.libraries:
                        import_module(name)
                    with stop.released():
                        logger.start(run, step)
                except (Exception, SystemExit) as error:
                    raise UserError(
                        f"The logger {word(type(logger))} could not start: {describe(error)} Correct this, or leave it "
                        f"out. Then resume the run: {option('resume')}."
                    ) from error
                self.active.append(logger)
            yield
        finally:
            try:
                with ExitStack() as stack:
                    for logger in reversed(self.active):
                        stack.callback(self._finish, logger)
            except KeyboardInterrupt as error:
                if self._result is None:
                    raise
                raise KeyboardInterrupt("The result of the run is saved.") from error

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Calls `on_step` of each logger with a copy of `metrics` and the learning rate."""
        for logger in [*self.active]:
            with self._reported(logger):
                logger.on_step(step, {"learning_rate": self._learning_rate(step), **metrics})

    def _learning_rate(self, step: int) -> float:
        """Returns the learning rate of the update to which a step (from 1) contributes."""
        update = (step - 1) // self._accumulate_steps
        return float(self._learning_rates[min(update, len(self._learning_rates) - 1)])

    def on_epoch(self, row: dict[str, Any], state: TrainState) -> None:
        """Calls `on_epoch` of each logger with a copy of `row` and the learning rate.

        A logger whose method is not one of cnnjax receives a copy of `state`.
        """
        for logger in [*self.active]:
            with self._reported(logger):
                ours = getattr(logger.on_epoch, "__module__", "").startswith("cnnjax.")
                values = {**row, "learning_rate": self._learning_rate(row["step"])}
                logger.on_epoch(values, state if ours else copy_state(state))

    def result(self, result: Result) -> None:
        """Keeps the result of the run, which `finish` of each logger receives at the end of the context."""
        self._result = result

    def _finish(self, logger: Logger) -> None:
        with self._reported(logger, "The run is not affected."):
            logger.finish(self._result)

    @contextmanager
    def _reported(self, logger: Logger, effect: str = "The run continues without it.") -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self.active.remove(logger)
            self._say(f"The logger {word(type(logger))} failed: {describe(error)} {effect}")


def _warn(line: str) -> None:
    """Warns each time, not only the first time in a process. The line names its place."""
    warnings.warn_explicit(line, UserWarning, "cnnjax", 0, registry={})


def check_loggers(loggers: Any) -> None:
    """Raises a `UserError` unless this is a sequence of loggers with methods of their own, no two of the same class."""
    several = isinstance(loggers, Sequence) and not isinstance(loggers, str)
    listed = [*loggers] if several else [loggers]
    names = for_reader(*(", ".join(_describe(x, make) for x in listed) for make in (word, lambda cls: cls.__name__)))
    if not several or not all(isinstance(x, Logger) for x in listed):
        raise UserError(f"`loggers` must be a list of loggers, got {names}. Write loggers=[TensorBoard()].")
    parameter, rule = for_reader("log", "loggers"), for_reader("different names", "objects of different classes")
    methods = ("start", "on_step", "on_epoch", "finish")
    for x in listed:
        check_methods(type(x), Logger, parameter)
        own = any(getattr(getattr(x, name), "__func__", None) is not getattr(Logger, name) for name in methods)
        got = f"{type(x).__name__}, which has none of its own"
        check(parameter, f"loggers with a method {', '.join(methods[:-1])} or finish", own, got)
    check(parameter, rule, len({*map(type, listed)}) == len(listed), names)


def _describe(value: Any, name: Callable[[type], str]) -> str:
    """Returns the name of the class of a logger, or the class or other value that was given in its place."""
    if isinstance(value, Logger):
        return name(type(value))
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)


def config_values(config: Config) -> dict[str, str | int | float | bool]:
    """Returns the options of a configuration by their dotted names."""
    flat = flatten(encode(config))
    return {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in flat.items()}


def step_values(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the values of a step: batch/loss, batch/learning_rate and so on."""
    return {f"batch/{name}": value for name, value in metrics.items()}


@jit(static_argnames=("optim", "num_updates"))
def make_learning_rates(*, optim: Optimizer, num_updates: int) -> Float[Array, " U"]:
    """Returns the learning rate of each update of a run."""
    schedule: Any = optim.make_schedule(num_updates)
    return jax.vmap(lambda update: jnp.asarray(schedule(update), jnp.float32))(jnp.arange(num_updates))


def epoch_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of an epoch: train/loss, validation/accuracy, images_per_second, learning_rate and so on."""
    others = ("epoch", "best_epoch", "step", "params_sha256")
    numbers = {name: float(value) for name, value in row.items() if name not in others}
    renamed = {name: name.replace("_", "/", 1) for name in row if name.startswith(("train_", "validation_"))}
    return {renamed.get(name, name): value for name, value in numbers.items()}


def test_values(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the test scores of a result: test/accuracy and so on."""
    values = {name: value for name, value in result.items() if name.startswith("test_")}
    values |= {f"test_{name}": value for name, value in values.pop("test_metrics", {}).items()}
    return {name.replace("_", "/", 1): value for name, value in values.items()}
