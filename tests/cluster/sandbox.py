"""A real SLURM on this machine: some nodes, fake GPUs, no root needed, gone when it is stopped.

Its munge, controller and node daemons run in the foreground as our children, with their own key, ports and folder.
Needs Python and Debian's slurm-wlm and munge alone; `scripts/slurm_sandbox` starts one by hand.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.launch.rank_env import free_port
from harness.signals import end_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
START_LIMIT_SECONDS = 60.0
STOP_LIMIT_SECONDS = 10.0
CONFIGURATION = """\
ClusterName=sandbox{pid}
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until its credential has run out: 120 s by default, 5 at least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The CPUs of this file, whatever the machine has.
SlurmdParameters=config_overrides
# What can never run is refused, not queued for ever.
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
"""


def program(name: str) -> str | None:
    """The path of a program; Debian keeps daemons in /usr/sbin, where an ordinary user does not look."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing_programs() -> list[str]:
    """The programs a sandbox needs that are not there."""
    return [name for name in PROGRAMS if program(name) is None]


@dataclass
class Sandbox:
    """A cluster in a folder, as a context.

    Attributes:
        gpus: fake ones per node: devices that do nothing, but are counted and handed out as real ones.
        extra: further lines of slurm.conf.
        addresses: of the controller and each node; default: all on the loopback interface with ports of their own.
        inside: the words before a daemon's command that bring it to its own host (the controller is node 0).
    """

    folder: Path
    nodes: int = 2
    cpus: int = 2
    gpus: int = 0
    extra: Sequence[str] = ()
    addresses: Sequence[str] = ()
    inside: Callable[[int], list[str]] = lambda number: []
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def configuration(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands speak to this cluster."""
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return inherited | {"SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> Sandbox:
        """Start everything and wait until every node is idle; RuntimeError where that fails, with nothing left."""
        try:
            self._write()
            munge = self.folder / "munge"
            files = (f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed"))
            self._spawn("munged", 0, ["munged", "-F", f"--socket={munge / 'socket'}", *files])
            self._wait_for((munge / "socket").exists)
            self._spawn("slurmctld", 0, ["slurmctld", "-D", "-i", "-c"])
            for number in range(1, self.nodes + 1):
                self.start_node(number)
            self._wait_for(self._is_idle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End all jobs, then all daemons, then whatever of them is left."""
        if "slurmctld" in self.processes:
            self.run("scancel", "--full", f"--user={_user()}", check=False)
            with contextlib.suppress(RuntimeError):
                self._wait_for(lambda: not self.run("squeue", "-h", check=False).strip(), limit=STOP_LIMIT_SECONDS)
        for name in [*(n for n in self.processes if n.startswith("node")), "slurmctld", "munged"]:
            self._end(name, signal.SIGTERM)
        for pid, _ in self.leftovers():
            _kill(pid)

    def start_node(self, number: int) -> None:
        """Start the daemon of node 1, 2, …"""
        self._spawn(f"node{number}", number, ["slurmd", "-D", "-N", f"node{number}"])

    def cut_off_node(self, number: int) -> None:
        """SIGKILL a node's daemon alone, as when its network breaks: the processes of its jobs run on."""
        self._end(f"node{number}", signal.SIGKILL)
        self.run("scontrol", "update", f"nodename=node{number}", "state=down", "reason=cut off")

    def kill_node(self, number: int) -> None:
        """SIGKILL a node's daemon and every process of its jobs, and tell the controller, as its health check would."""
        self._end(f"node{number}", signal.SIGKILL)
        for pid, environment in self.leftovers():
            if f"SLURMD_NODENAME=node{number}" in environment or self._is_stepd_of(pid, number):
                _kill(pid)
        self.cut_off_node(number)

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a command of SLURM's; RuntimeError where it fails, unless `check` is False."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def leftovers(self) -> list[tuple[int, list[str]]]:
        """Pid and environment of all processes that were started in this cluster."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                    if f"SLURM_CONF={self.configuration}" in environment:
                        found.append((int(entry.name), environment))
        return found

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()  # of each node in each partition
        return len(states) >= self.nodes and set(states) == {"idle"}

    def _spawn(self, name: str, number: int, command: Sequence[str]) -> None:
        path = program(command[0])
        if path is None:
            raise RuntimeError(f"{command[0]} is not installed: apt-get install slurm-wlm munge")
        with open(self.folder / "log" / f"{name}.out", "ab") as output:
            self.processes[name] = subprocess.Popen(
                [*self.inside(number), path, *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_for(self, condition: Callable[[], bool], limit: float = START_LIMIT_SECONDS) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{f.name}: {f.read_text()[-800:]}" for f in (self.folder / "log").iterdir())
                raise RuntimeError(f"ended: {ended}, limit {limit} s\n{logs}")
            time.sleep(0.05)

    def _is_stepd_of(self, pid: int, number: int) -> bool:
        """A slurmstepd outlives the daemon that started it; its open files tell whose it was."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            files = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            return False
        own = (f"{self.folder}/spool.node{number}", f"{self.folder}/log/node{number}.log")
        return words.startswith(b"slurmstepd") and any(f.startswith(own) for f in files)

    def _write(self) -> None:
        """Write the key and the configuration."""
        for name in ("state", "log", "munge", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)  # munged wants its socket within the reach of all
        (self.folder / "munge").chmod(0o755)  # munged refuses folders that others can write to
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        controller = f"controller({self.addresses[0]})" if self.addresses else "localhost(127.0.0.1)"
        settings = {"controller": controller, "port": free_port(), "user": _user(), "folder": self.folder}
        # Several clusters at a time differ by name, and so do the ports that their jobs choose.
        text = CONFIGURATION.format(pid=os.getpid(), **settings)
        gpus, devices = "", ["AutoDetect=off"]
        if self.gpus:
            text, gpus = f"{text}GresTypes=gpu\n", f"Gres=gpu:{self.gpus}"
        ports: set[int] = set()
        for number in range(1, self.nodes + 1):
            ports.add(port := next(p for p in iter(free_port, 0) if p not in ports))
            address = self.addresses[number] if self.addresses else "127.0.0.1 NodeHostname=localhost"
            text += f"NodeName=node{number} NodeAddr={address} Port={port} CPUs={self.cpus} RealMemory=4000 {gpus}\n"
            for gpu in range(self.gpus):
                device = self.folder / "dev" / f"node{number}_nvidia{gpu}"
                device.symlink_to("/dev/null")
                devices.append(f"NodeName=node{number} Name=gpu File={device}")
        (self.folder / "gres.conf").write_text("\n".join([*devices, ""]))
        partition = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        self.configuration.write_text(text + "\n".join([partition, *self.extra, ""]))


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
