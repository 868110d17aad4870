"""Finds the processes of a run by the arguments, the environment and the scheduler."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from cnnjax.errors import UserError, check, for_reader
from cnnjax.process.settings import free_port

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


class Scheduler(NamedTuple):
    """A scheduler that has started more than one process.

    Attributes:
      method: what jax calls its detector, or "" if jax has none for it.
      num_processes: None if jax must ask the scheduler.
      process_id: None if jax must ask the scheduler.
      whole_host: whether the only process of a host uses all its devices; jax's detector would select the first.
    """

    method: str
    num_processes: int | None = None
    process_id: int | None = None
    whole_host: bool = False


class Launch(NamedTuple):
    """The processes of a run; what is None must be asked of `scheduler`."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    scheduler: Scheduler | None


def detect(environ: Mapping[str, str], *, tpu_vm: bool = False) -> Scheduler | None:
    """Returns the scheduler that has started more than one process, from its variables; None for a single process.

    Unlike jax's own detectors, it ignores the allocation of a Slurm job outside of a step of several tasks, and the
    variables that every pod of Kubernetes has.

    Args:
      environ: the environment.
      tpu_vm: whether this machine is a virtual machine with TPUs, of which only the network knows the size.
    """
    # First, because mpirun starts its daemons as one step of a Slurm job.
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        method = "ompi" if "OMPI_MCA_orte_hnp_uri" in environ else ""  # Open MPI 5 does not set it.
        return Scheduler(method, _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK"))
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_STEP_NODELIST" in environ:
        tasks = re.sub(r"\(x\d+\)", "", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return Scheduler(
            "slurm",
            _number(environ, "SLURM_STEP_NUM_TASKS"),
            _number(environ, "SLURM_PROCID"),
            whole_host={*tasks.split(",")} == {"1"},
        )
    platforms = environ.get("JAX_PLATFORMS", "")
    if not tpu_vm or (platforms and "tpu" not in platforms):
        return None
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if workers:
        several = len(workers.split(",")) > 1 or _number(environ, "MEGASCALE_NUM_SLICES") > 1
        return Scheduler("gketpu", whole_host=True) if several else None
    return None if "TPU_SKIP_MDS_QUERY" in environ else Scheduler("gcetpu", whole_host=True)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip()
    return int(text) if text.isdecimal() else 0


def plan_launch(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str],
    *,
    tpu_vm: bool = False,
) -> Launch | None:
    """Returns the processes of a run, or None for a single one.

    Arguments take precedence over the environment, and both over the scheduler.

    Raises:
      UserError: something is missing or inconsistent.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in VARIABLES.items():
        if given[name] is None and (text := environ.get(variable, "").strip()):
            check(f"${variable}", "a number", name == "coordinator" or text.isdecimal(), repr(text))
            given[name] = text if name == "coordinator" else int(text)
    coordinator, num_processes, process_id = given.values()  # pyright: ignore[reportAssignmentType]
    scheduler = detect(environ, tpu_vm=tpu_vm)
    if scheduler is None and all(value is None for value in given.values()):
        return None
    if scheduler is not None:
        num_processes = scheduler.num_processes if num_processes is None else num_processes
        process_id = scheduler.process_id if process_id is None else process_id
    if num_processes == 1:
        process_id = 0 if process_id is None else process_id
        coordinator = f"localhost:{free_port()}" if coordinator is None else coordinator
    can_ask = scheduler is not None and scheduler.method != ""
    values = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in values.items() if value is None]
    if missing and not can_ask:
        names = [for_reader(f"`--{name.replace('_', '-')}`", f"`{name}`") for name in missing]
        variables = ", ".join(f"${VARIABLES[name]}" for name in missing)
        raise UserError(
            f"{' and '.join(names)} must be given for several processes that no scheduler describes, got None. Give "
            f"each process the address of process 0, the number of processes and its own number (or set {variables})."
        )
    if num_processes is not None:
        check("num_processes", "at least 1", num_processes >= 1, num_processes)
    if process_id is not None:
        below = "" if num_processes is None else f" and below `num_processes` ({num_processes})"
        valid = 0 <= process_id < (num_processes or process_id + 1)
        check("process_id", f"at least 0{below}", valid, process_id)
    if coordinator is not None:
        split_address(coordinator)
    return Launch(coordinator, num_processes, process_id, scheduler)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT or [IPV6]:PORT.

    Raises:
      UserError: it is neither.
    """
    match = re.fullmatch(r"(\[[:.%\w]+\]|[^:\[\]/\s]+):(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(f"`coordinator` must be HOST:PORT, where process 0 will listen, got {address!r}.")
    return match[1].strip("[]"), int(match[2])
