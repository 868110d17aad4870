import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from cnnjax.errors import UserError
from cnnjax.hosts import alone, connect
from cnnjax.hosts.agreement import Agreement, Requests
from cnnjax.hosts.launch import Launch, Scheduler, plan_launch
from cnnjax.hosts.meeting import meet
from cnnjax.process.settings import free_port

PROGRAM = Path(__file__).parent / "programs" / "hosts.py"
TIMEOUT = 3  # Seconds.


class Processes:
    """Several processes of programs/hosts.py."""

    def __init__(self, scenario, count, *, host_timeout=TIMEOUT):
        self.address = f"localhost:{free_port()}"
        arguments = [[scenario, self.address, str(count), str(i), str(host_timeout)] for i in range(count)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen([sys.executable, PROGRAM, *words], **pipes) for words in arguments]

    def wait_until_ready(self):
        for process in self.processes:
            while (line := process.stdout.readline()) and "ready" not in line:
                pass
            assert line, process.stderr.read()

    def send(self, index, signum):
        os.kill(self.processes[index].pid, signum)

    def finish(self, *indices, timeout=60):
        """Returns exit code, facts and stderr of some processes."""
        results = []
        for i in indices or range(len(self.processes)):
            out, err = self.processes[i].communicate(timeout=timeout)
            facts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            results.append((self.processes[i].returncode, facts, err))
        return results


@contextmanager
def processes(*arguments, **options):
    group = Processes(*arguments, **options)
    try:
        yield group
    finally:
        for process in group.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def last_lines(results):
    return [err.strip().splitlines()[-1] for _, _, err in results]


def test_all_processes_stop_and_save_at_the_same_steps():
    with processes("agree", 3) as group:
        group.wait_until_ready()
        time.sleep(0.8)
        group.send(2, signal.SIGTERM)
        results = group.finish()
    assert [code for code, _, _ in results] == [75, 75, 75], results
    facts = [facts[-1] for _, facts, _ in results]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["stop"] == signal.SIGTERM
    assert facts[0]["saved"]


@pytest.mark.slow
def test_share_and_barrier():
    with processes("share", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    for i, (_, facts, _) in enumerate(results):
        assert facts[0]["value"] == {"from": 0, "list": [1, 2.5, None]}
        assert (facts[0]["count"], facts[0]["leads"], facts[0]["total"]) == (2, i == 0, 3)
        assert facts[0]["names"] == [socket.gethostname()] * 2


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["agree", "reduce"])
@pytest.mark.parametrize("attempt", range(3))
def test_processes_agree_each_time(scenario, attempt):
    with processes(scenario, 3) as group:
        group.wait_until_ready()
        time.sleep(0.5 + attempt / 3)
        group.send(attempt, signal.SIGTERM)
        group.send((attempt + 1) % 3, signal.SIGTERM)
        results = group.finish()
    assert [code for code, _, _ in results] == [75, 75, 75], results
    assert results[0][1][-1] == results[1][1][-1] == results[2][1][-1]


def test_a_lost_process_is_named():
    with processes("reduce", 2) as group:
        group.wait_until_ready()
        group.send(1, signal.SIGKILL)
        start = time.monotonic()
        results = group.finish(0)
        assert time.monotonic() - start < 3 * TIMEOUT
    name = socket.gethostname()
    for code, _, err in results:
        assert (code, len(err.splitlines())) == (75, 1), err
        assert err.startswith(f"Process 1 (host {name}) has not answered for 3 s: stopping.")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["reduce", "wait"])
def test_a_lost_coordinator_is_named(scenario):
    with processes(scenario, 3) as group:
        group.wait_until_ready()
        group.send(0, signal.SIGKILL)
        start = time.monotonic()
        results = group.finish(1, 2)
        assert time.monotonic() - start < 3 * TIMEOUT
    assert [code for code, _, _ in results] == [75, 75], results
    for line in last_lines(results):
        assert line.startswith(f"Process 0 (host {socket.gethostname()}) has ended or cannot be reached: stopping.")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["reduce", "agree"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_process_is_lost_and_ends_when_it_continues(scenario, index):
    with processes(scenario, 3) as group:
        group.wait_until_ready()
        group.send(index, signal.SIGSTOP)
        results = group.finish(*{0, 1, 2} - {index})
        assert [code for code, _, _ in results] == [75, 75], results
        for line in last_lines(results):
            assert line.startswith(f"Process {index} (host {socket.gethostname()}) has not answered for 3 s")
        group.send(index, signal.SIGCONT)
        ((code, _, err),) = group.finish(index)
    assert code == 75, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "index"), [("share_error", 0), ("user_error", 1), ("slow_end", 1), ("late_error", 1)]
)
def test_an_error_of_one_process_ends_all(scenario, index):
    with processes(scenario, 3) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [2, 2, 2], results
    text = "`batch_size` must be even, got 3."
    for i, (_, _, err) in enumerate(results):
        if i == index:
            assert f"UserError: {text}" in err.splitlines()
        else:
            assert err == f"Process {index} (host {socket.gethostname()}) ended: {text}\n"


@pytest.mark.slow
def test_a_bug_in_one_process_ends_all():
    with processes("crash", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [1, 1], results
    assert "ZeroDivisionError: a bug" in results[0][2]
    assert results[1][2].startswith(f"Process 0 (host {socket.gethostname()}) ended: ")
    assert "ZeroDivisionError: a bug" in results[1][2]


@pytest.mark.slow
def test_a_process_that_compiles_for_long_is_not_lost():
    with processes("compile", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[1][1][-1]["seconds"] > 3 * TIMEOUT


@pytest.mark.slow
def test_a_program_may_have_connected_jax_itself():
    with processes("library", 2) as group:
        results = group.finish()
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[0][1][0] == {"count": 2, "names": [socket.gethostname()] * 2, "same": True}


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
JAX = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environ", "tpu_vm", "expected"),
    [
        ({}, False, None),
        (STEP, False, Launch(None, 2, 1, Scheduler("slurm", 2, 1, whole_host=True))),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, False, Launch(None, 2, 1, Scheduler("slurm", 2, 1))),
        # A step of one task in an allocation for four, as `srun -n1` or an interactive shell has it.
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, None),  # A batch script.
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911"},
            False,
            Launch(None, 4, 2, Scheduler("ompi", 4, 2)),
        ),
        # mpirun inside of a Slurm job: its daemons are a step, whose variables the processes inherit.
        (STEP | OMPI | JAX, False, Launch("node1:1234", 4, 3, Scheduler("", 4, 2))),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", **JAX}, False, Launch("node1:1234", 4, 3, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, Launch(None, None, None, Scheduler("gketpu", whole_host=True))),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, True, None),
        ({}, True, Launch(None, None, None, Scheduler("gcetpu", whole_host=True))),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ],
)
def test_schedulers_are_recognized_by_their_variables(environ, tpu_vm, expected):
    assert plan_launch(None, None, None, environ, tpu_vm=tpu_vm) == expected


def test_arguments_take_precedence_over_the_environment():
    assert plan_launch("here:1", 2, 0, JAX) == Launch("here:1", 2, 0, None)
    assert plan_launch(None, 2, 0, JAX) == Launch("node1:1234", 2, 0, None)
    single = plan_launch(None, 1, None, {})
    assert single is not None
    assert single[1:] == (1, 0, None)
    assert single.coordinator is not None
    assert single.coordinator.startswith("localhost:")


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (("a:1", None, None), {}, "`num_processes` and `process_id` must be given"),
        ((None, 2, 0), {}, "`coordinator` must be given"),
        ((None, None, None), OMPI, "`coordinator` must be given"),  # Of Open MPI 5.
        ((None, None, None), {"JAX_NUM_PROCESSES": "2"}, "`coordinator` and `process_id` must be given"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "`\\$JAX_NUM_PROCESSES` must be a number, got 'two'"),
        (("a:1", 2, 2), {}, "`process_id` must be at least 0 and below `num_processes` \\(2\\), got 2"),
        (("a:1", 2, -1), {}, "`process_id` must be at least 0"),
        (("a:1", 0, 0), {}, "`num_processes` must be at least 1, got 0"),
        (("a", 2, 0), {}, "`coordinator` must be HOST:PORT, where process 0 will listen, got 'a'"),
        (("a:70000", 2, 0), {}, "`coordinator` must be HOST:PORT"),
    ],
)
def test_wrong_or_missing_arguments(arguments, environ, message):
    with pytest.raises(UserError, match=message):
        plan_launch(*arguments, environ)


def test_connect_comes_first():
    jax.devices()
    with pytest.raises(UserError, match="`connect` must be called before jax uses a device"):
        connect("localhost:1", 2, 1)
    for seconds in (0.0, math.inf, math.nan):
        with pytest.raises(UserError, match=rf"`host_timeout` must be from 1 to 1e6 seconds, got {seconds}"):
            connect(host_timeout=seconds)
        with pytest.raises(
            UserError, match=rf"`connect_timeout` must be positive, and at most 1e6 seconds, got {seconds}"
        ):
            connect(connect_timeout=seconds)


def test_a_single_process_agrees_with_itself():
    with alone() as hosts:
        assert (hosts.index, hosts.count, hosts.leads) == (0, 1, True)
        assert hosts.share(lambda: (1, 2)) == (1, 2)
        assert hosts.agreed(stop=15, save=True) == (15, True)
        hosts.barrier("any")


def meet_all(count, indices, *, timeout=5.0):
    """Returns what each of several threads, as processes, got from `meet`: None or a message."""
    address = f"localhost:{free_port()}"

    def arrive(index):
        own_count, number = index if isinstance(index, tuple) else (count, index)
        try:
            return meet(address, own_count, number, timeout=timeout, say=lambda line: None)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(indices)) as pool:
        return [*pool.map(arrive, indices)]


def test_processes_meet():
    assert meet_all(3, [2, 0, 1]) == [None, None, None]


def test_missing_processes_are_named():
    results = meet_all(4, [0, 2], timeout=0.5)
    assert results[0] == results[1]
    assert "within 0.5 s, but these did not come: 1, 3. Start them" in results[0]
    (alone_without_coordinator,) = meet_all(2, [1], timeout=0.5)
    assert "`coordinator` must be an address where process 0 listens, got localhost:" in alone_without_coordinator
    assert "which process 1 could not reach within 0.5 s (Connection refused)" in alone_without_coordinator


def test_processes_must_be_consistent():
    assert set(meet_all(3, [0, 1, 1])) == {"`process_id` must be different in all processes, got 1 twice."}
    text = "`num_processes` must be the same in all processes, got 2 in process 0 and 3 in process 1."
    assert meet_all(2, [0, (3, 1)]) == [text, text]


def test_the_port_of_process_0_must_be_free():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="`coordinator` must be an address where process 0 can listen, got localh"):
            meet(address, 2, 0, timeout=1.0, say=lambda line: None)


def test_the_decision_is_the_last_boundary_that_a_process_comes_to():
    first, second, requests = Agreement(), Agreement(), Requests()

    def exchange():
        requests.update([first.entry(), second.entry()])
        for agreement in (first, second):
            agreement.see(requests.number, requests.decision)

    for _ in range(4):
        assert first.arrive(None, False) == (None, False)
    assert second.arrive(15, True) == (None, False)  # Process 0 alone decides whether to save.
    exchange()  # Both are frozen, before boundary 5 and before boundary 2.
    exchange()
    assert requests.decision == (1, 5, 15, False)
    assert [second.arrive(15, False) for _ in range(4)] == [(None, False)] * 3 + [(15, False)]
    exchange()
    assert requests.number == 1  # The first has not acted yet.
    assert first.arrive(None, False) == (15, False)
    exchange()
    assert requests.number == 1  # Nothing else is asked for.
    assert first.arrive(None, True) == (None, False)
    exchange()
    exchange()
    assert requests.decision == (2, 7, None, True)


def test_passing_a_boundary_costs_microseconds():
    agreement = Agreement()
    start = time.perf_counter()
    for _ in range(10_000):
        agreement.arrive(None, False)
    assert (time.perf_counter() - start) / 10_000 < 50e-6
