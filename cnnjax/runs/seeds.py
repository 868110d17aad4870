"""Many seeds of one configuration, in one process and with one compilation."""

import os
import re
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax

from cnnjax.runs import directory as rundir
from cnnjax.config import Config
from cnnjax.data.datasets import load_dataset
from cnnjax.errors import UserError
from cnnjax.train import train_and_evaluate
from cnnjax.runs.manifest import num_cores
from cnnjax.cli.console import Report
from cnnjax.cli.signals import Interrupted, stop_signals


def parse_seeds(text: str) -> tuple[int, ...]:
    """Returns the seeds of "0:10" (0 to 9) or "0,3,7", in order.

    Raises:
      UserError: it is neither, or has no seed or one twice.
    """
    seeds: tuple[int, ...] = ()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        seeds = tuple(range(int(match[1]), int(match[2])))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        seeds = tuple(map(int, text.split(",")))
    if not seeds or len({*seeds}) < len(seeds):
        raise UserError(f"`seeds` must be a range such as 0:10 (0 to 9) or a list such as 0,3,7, got {text!r}.")
    return seeds


def use_cores(count: int) -> None:
    """Lets `count` seeds train at a time on a CPU, at most one a core: each core becomes a device.

    Without effect once jax has made its first array, and where the user has said how many devices there are.
    """
    if "device_count" not in os.environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(count, num_cores()))


def train_seeds(
    config: Config,
    seeds: tuple[int, ...],
    *,
    folder: Path | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Trains `config` with each seed, in a run directory each.

    Each seed on one device, as many at a time as there are devices; the step is traced once, and compiled once a
    device. After `use_cores` every core of a CPU is such a device, and they share their work:
    `experiments/benchmark_runs.py` measures this beside one seed after another, and beside `vmap`. A seed has the same
    bits as alone on one device.

    Args:
      config: its own seed does not count.
      folder: holds the run directories, seed<k>; they are runs/<experiment>-seed<k> when None.
      data_dir, resume, checkpoint_seconds, report: as of `train_and_evaluate`, for every seed; seeds that ended are not
        trained again.

    Returns:
      The content of result.json of each seed.

    Raises:
      UserError: what the user can mend; before the first step where it can be known then.
      NonFiniteLossError, Interrupted: as of `train_and_evaluate`.
    """
    report = report or Report(quiet=True)
    configs = [replace(config, seed=seed) for seed in seeds]
    folders = [rundir.default_run_dir(c) if folder is None else folder / f"seed{c.seed}" for c in configs]
    for run_dir, c in zip(folders, configs, strict=True):
        if run_dir.is_dir():
            rundir.check_run(run_dir, c, resume)
    load_dataset(config.dataset, data_dir, report.say)  # Once: the threads below find it prepared.
    devices = jax.local_devices()
    free: SimpleQueue[Any] = SimpleQueue()
    for device in devices:
        free.put(device)
    with stop_signals() as stop:

        def train(run_dir: Path, config: Config, report: Report) -> dict[str, Any]:
            device = free.get()
            try:
                if stop.signum is not None:  # This seed was waiting for its turn.
                    raise Interrupted(stop.signum)
                with jax.default_device(device):
                    return train_and_evaluate(
                        config,
                        run_dir=run_dir,
                        data_dir=data_dir,
                        resume=resume,
                        checkpoint_seconds=checkpoint_seconds,
                        devices=[device],
                        report=report,
                        stop=stop,
                    )
            finally:
                free.put(device)

        if min(len(devices), len(seeds)) == 1:
            return [train(run_dir, c, report) for run_dir, c in zip(folders, configs, strict=True)]
        reports = [report.of(f"seed {seed}: ") for seed in seeds]  # Several bars would overwrite each other.
        with stop.held(), ThreadPoolExecutor(len(devices)) as threads:
            futures = [threads.submit(train, *job) for job in zip(folders, configs, reports, strict=True)]
            # Python handles signals in this thread alone, and one that another thread got does not wake it.
            while wait(futures, timeout=0.1).not_done:
                pass
        return [future.result() for future in futures]
