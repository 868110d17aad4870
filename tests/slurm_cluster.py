"""A Slurm of two nodes on this machine, for tests: slurmctld and two slurmd in a temporary folder, on free ports."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "scontrol"]
HOSTS = Path("/etc/hosts")

# cred_expire is also the time after which a requeued job may start again (120 s by default).
CONFIGURATION = """
ClusterName=cnnjax
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1
ReturnToService=2
JobRequeue=1
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
KillWait={kill_wait}
SlurmdTimeout={node_timeout}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def install():
    """Installs Debian's packages if a program is missing."""
    if all(map(shutil.which, PROGRAMS)):
        return
    print(f"Installing {', '.join(PACKAGES)}.", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", "--no-install-recommends"]):
        words = command if command[1] == "update" else [*command, *PACKAGES]
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """A running cluster: a context manager. Its node names stand in /etc/hosts until it ends.

    Args:
      folder: a new one, for its files.
      variables: the environment of its daemons and jobs.
      num_nodes: how many.
      kill_wait: the seconds between SIGTERM and SIGKILL when a job is requeued.
      node_timeout: the seconds without an answer after which a node is down.
      grace: the seconds between SIGTERM and the end of a job that one in the partition `urgent` preempts.

    Attributes:
      nodes: the names of the nodes.
      environment: variables with which Slurm's commands find the cluster.
    """

    def __init__(self, folder, variables, *, num_nodes=2, kill_wait=30, node_timeout=60, grace=60):
        self.folder = Path(folder)
        self.nodes = [f"cnnjax-node{i}" for i in range(1, num_nodes + 1)]
        self.environment = {**variables, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._settings = {"kill_wait": kill_wait, "node_timeout": node_timeout, "grace": grace}
        self._daemons = {}
        self._hosts_line = f"127.0.0.1 {' '.join(self.nodes)} # a test of cnnjax\n"

    def __enter__(self):
        (self.folder / "state").mkdir(parents=True)
        controller, *ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname()
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=4000 State=UNKNOWN"
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        text = CONFIGURATION.format(
            folder=self.folder, host=host, controller=controller, nodes="\n".join(lines), **self._settings
        )
        (self.folder / "slurm.conf").write_text(text)
        with HOSTS.open("a") as hosts:
            hosts.write(self._hosts_line)
        try:
            self._start("slurmctld", "-D")
            for name in self.nodes:
                self.start_node(name)
            self.wait_for(lambda: self.states() == ["idle"] * len(self.nodes), 60, "the nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        with suppress(subprocess.CalledProcessError):
            self.command("scancel", "--user", "root")
            self.wait_for(lambda: not self.command("squeue", "-h"), 30, "no job runs")
        for process in self._daemons.values():
            process.send_signal(signal.SIGTERM)
        for process in self._daemons.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if line != self._hosts_line))

    def start_node(self, name):
        """Starts the daemon of a node."""
        self._start(name, "-D", "-N", name)

    def tasks(self, number, name):
        """Returns the ids of the processes of a job's steps on a node, that is, without its batch script."""
        wanted = {f"SLURM_JOB_ID={number}", f"SLURMD_NODENAME={name}", "SLURM_STEP_ID=0"}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if wanted <= set(path.read_text(errors="replace").split("\0")):
                    found.append(int(path.parent.name))
        return found

    def kill_node(self, number, name):
        """Ends all that a job runs on a node, and its daemon, at once, as a power failure does.

        The node must not be the first, which runs the batch script. It returns with `start_node`.
        """
        tasks = self.tasks(number, name)
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in tasks}
        steps = {pid for pid in parents if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd"}
        daemon = self._daemons[name]
        for pid in [daemon.pid, *steps, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def _start(self, name, *options):
        program = "slurmctld" if name == "slurmctld" else "slurmd"
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(program) or f"/usr/sbin/{program}", *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def command(self, *words, cwd=None):
        """Runs a command of Slurm; returns its output."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def submit(self, script, *arguments, options=(), cwd=None):
        """Submits a job; returns its number."""
        return self.command("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd)

    def job(self, number):
        """Returns the fields of a job, such as JobState."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def states(self):
        """Returns the states of the nodes, such as idle or down*."""
        with suppress(subprocess.CalledProcessError):
            return self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        return []

    def wait_for(self, condition, seconds, what):
        """Waits until a condition holds.

        Raises:
          TimeoutError: it did not within the time; the message contains the ends of the logs.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                tails = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)
                raise TimeoutError(f"Not within {seconds} s: {what}\n{tails}")
            time.sleep(0.2)
