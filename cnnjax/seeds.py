"""Many seeds of one configuration, in one process and with one compilation."""

import math
import os
import re
import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax

from cnnjax.config import Config, word
from cnnjax.errors import NonFiniteLossError, StorageError, UserError, check, describe, for_reader
from cnnjax.inputs import load_inputs
from cnnjax.process.console import Report
from cnnjax.process.settings import num_cores, start_jax
from cnnjax.process.signals import Interrupted, stop_signals
from cnnjax.runs.directory import check_path, check_run
from cnnjax.runs.loggers import Logger
from cnnjax.runs.manifest import is_finished
from cnnjax.runs.records import data_version, read_record
from cnnjax.runs.schema import Result
from cnnjax.runs.source import source_of
from cnnjax.sharding import parse_mesh
from cnnjax.train import train_run

MAX_SEEDS = 10_000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Returns the seeds of "0:10" (0 to 9) or "0,3,7", in order.

    Raises:
      UserError: it is neither, such as one number, or has no seed, too many, one twice, or one of more than 32 bits.
    """
    seeds: Sequence[int] = ()
    if match := re.fullmatch(r"(\d{1,10}):(\d{1,10})", text):
        seeds = range(int(match[1]), int(match[2]))
    elif re.fullmatch(r"\d{1,10}(,\d{1,10})+", text):
        seeds = [int(seed) for seed in text.split(",")]
    valid = 0 < len(seeds) <= MAX_SEEDS and len({*seeds}) == len(seeds) and max(seeds) < 2**32
    rule = f"a range such as 0:10 (0 to 9) or a list such as 0,3,7, of 1 to {MAX_SEEDS:,} different seeds below 2**32"
    fix = f". Three seeds are --seeds 0:3; one seed is --seed {text}" if re.fullmatch(r"\d{1,10}", text) else ""
    check("seeds", rule, valid, f"{reprlib.repr(text)}{fix}")
    return tuple(seeds)


def use_cores(count: int) -> None:
    """Makes each core a device, up to `count`, so that as many seeds train at the same time on a CPU.

    Has no effect once jax has made its first array, or if the user has set the number of devices.
    """
    if "device_count" not in os.environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(count, num_cores()))


def run_dir_of(config: Config, folder: Path | None) -> Path:
    """Returns the run directory of one of several seeds, see `train_seeds`."""
    return Path("runs") / config.run_name if folder is None else folder / f"seed{config.seed}"


def train_seeds(
    config: Config,
    seeds: tuple[int, ...],
    *,
    folder: Path | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    checkpoint_seconds: float = 60.0,
    mesh: str | None = None,
    stream: bool | None = None,
    report: Report | None = None,
) -> list[Result]:
    """Trains `config` with each seed, each in a run directory.

    Each seed trains on one device, or on those of `mesh`, as many at a time as there are devices for; the step is
    traced once, and compiled once per device. After `use_cores` every core of a CPU is a device.
    `experiments/benchmarks/runs.py` compares this with one seed after another, and with `vmap`. A seed gives the same
    bits as alone on as many devices.

    Args:
      config: its own seed is ignored.
      folder: contains the run directories, seed<k>; they are runs/<name>-seed<k> if None.
      loggers: a copy of each records each run.
      data_dir, resume, checkpoint_seconds, mesh, stream, report: see `train_and_evaluate`. Finished seeds are not
        trained again.

    Returns:
      The content of result.json of each seed.

    Raises:
      UserError: the user has to fix something; before the first step if it can be known then. If it concerns some
        seeds, the others are trained first.
      NonFiniteLossError, StorageError: the same of the first seed that failed.
      Interrupted: see `train_and_evaluate`.
    """
    start_jax()
    is_silent, report = report is None, report or Report(quiet=True)
    check("seeds", "different, and at least one", len({*seeds}) == len(seeds) > 0, seeds)
    size = math.prod(parse_mesh(mesh)) if mesh is not None else 1
    configs = [replace(config, seed=seed) for seed in seeds]
    folders = [run_dir_of(c, folder) for c in configs]
    for run_dir, c in zip(folders, configs, strict=True):
        check_path(run_dir)
        if run_dir.is_dir():
            check_run(run_dir, c, resume)
    copies = [_copy(loggers) for _ in seeds]
    code = source_of(config, *folders)  # Once: what trains, even if a file is edited meanwhile.
    version = next(filter(None, map(data_version, folders)), None)
    inputs = None
    if not (resume and all(_is_finished(run_dir, config) for run_dir in folders)):  # Else no data are needed.
        inputs = load_inputs(config, data_dir, report.say, version=version, stream=stream)
    devices = jax.local_devices()
    rule = f"of at most the {len(devices)} device{'s' if len(devices) > 1 else ''} of this process"
    check("mesh", rule, size <= len(devices), mesh)
    groups = [devices[i : i + size] for i in range(0, len(devices) - size + 1, size)]
    free: SimpleQueue[Any] = SimpleQueue()
    for group in groups:
        free.put(group)
    with stop_signals() as stop:

        def train(run_dir: Path, config: Config, loggers: list[Logger], report: Report | None) -> Result | UserError:
            group = free.get()
            try:
                if stop.signum is not None:  # This seed was still waiting.
                    raise Interrupted(stop.signum)
                with jax.default_device(group[0]):
                    run = train_run(
                        config,
                        run_dir=run_dir,
                        data_dir=data_dir,
                        resume=resume,
                        loggers=loggers,
                        checkpoint_seconds=checkpoint_seconds,
                        devices=group,
                        mesh=mesh,
                        report=report,
                        stop=stop,
                        stream=stream,
                        inputs=inputs,
                        code=code,
                    )
                    return run.finished_result()
            except UserError as error:  # The others need not wait for a correction.
                say(f"seed {config.seed}: {error}")
                kind = next(cls for cls in (StorageError, NonFiniteLossError, UserError) if isinstance(error, cls))
                return kind(str(error))  # The traceback of `error` holds the state of the training.
            finally:
                free.put(group)

        one_by_one, say = min(len(groups), len(seeds)) == 1, report.say
        # Several at a time have no progress bars, which would overwrite each other.
        prefixes = ["" if one_by_one else f"seed {seed}: " for seed in seeds]
        reports = [None if is_silent else report.with_prefix(prefix) for prefix in prefixes]
        jobs = zip(folders, configs, copies, reports, strict=True)
        if one_by_one:
            outcomes = [train(*job) for job in jobs]
            stop.finished = True
            return _results(outcomes, seeds)
        with stop.held(), ThreadPoolExecutor(len(groups)) as threads:
            futures = [threads.submit(copy_context().run, train, *job) for job in jobs]
            # Python handles signals only in this thread, and a signal to another thread does not wake it.
            while wait(futures, timeout=0.1).not_done:
                pass
            stop.finished = not any(future.exception() for future in futures)
        return _results([future.result() for future in futures], seeds)


def _is_finished(run_dir: Path, config: Config) -> bool:
    """Returns whether a run is finished, and not to be trained longer."""
    return is_finished(run_dir) and read_record(run_dir).config["num_epochs"] == config.num_epochs


def _copy(loggers: Sequence[Logger]) -> list[Logger]:
    """Returns copies of loggers, for one of several seeds."""
    copies = []
    for logger in loggers:
        try:
            copies.append(deepcopy(logger))
        except Exception as error:
            raise UserError(
                f"`{for_reader('log', 'loggers')}` must be loggers that `copy.deepcopy` can copy for each seed, got "
                f"{word(type(logger))}: {describe(error)} Open files and connections in `start`, not in the "
                "constructor."
            ) from error
    return copies


def _results(outcomes: Sequence[Result | UserError], seeds: Sequence[int]) -> list[Result]:
    """Returns the results of all seeds.

    Raises:
      UserError: some have failed; of the class of the first error, and with its message.
    """
    failed = {seed: x for seed, x in zip(seeds, outcomes, strict=True) if isinstance(x, UserError)}
    if failed:
        first, names = next(iter(failed.values())), ", ".join(map(str, failed))
        raise type(first)(f"{len(failed)} of {len(seeds)} seeds failed: {names}. The first: {first}")
    return [x for x in outcomes if not isinstance(x, UserError)]
