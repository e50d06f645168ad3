"""A real SLURM cluster on one machine, each node in namespaces of its own."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cluster.hosts import Hosts, alive, until

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
_FREEZER = Path("/sys/fs/cgroup/freezer")

# Nodes are given up after SlurmdTimeout, 10 seconds here, and 300 by default; a requeued job waits
# for cred_expire, 2 minutes by default. KillWait is the default.
_CONFIGURATION = """
ClusterName=cluster
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/login/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n/spool
StateSaveLocation={folder}/state
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=86400
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=5
MailProg=/bin/true
PlugStackConfig={folder}/plugstack.conf
"""


def missing():
    """Return why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "only root can make the namespaces of a cluster"
    if absent := [package for program, package in PROGRAMS.items() if shutil.which(program) is None]:
        return (
            f"not installed: {' '.join(absent)}; apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
    trial = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], check=False)
    return "namespaces are not allowed here" if trial.returncode else None


@dataclass(frozen=True)
class Job:
    """What the controller knows of a job."""

    state: str
    exit_code: str
    restarts: int
    nodes: str
    batch_host: str
    reason: str
    excluded: str

    @property
    def over(self):
        """Whether it has ended for good."""
        return self.state in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def _remove(group):
    try:
        group.rmdir()
    except OSError:
        return False
    return True


class Cluster(Hosts):
    """``slurmctld`` on ``login``, ``slurmd`` on ``node1`` and so on."""

    def __init__(self, folder, nodes, cpus=8):
        own = _FREEZER / f"cluster{os.getpid()}" if os.access(_FREEZER, os.W_OK) else None
        super().__init__(folder, [f"node{i + 1}" for i in range(nodes)], freezer=own)
        self.cpus = cpus
        self.munge = None

    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.freezer:
                self.freezer.mkdir()
            self._configure()
            self.connect()
            self._start_munge()
            self.boot("login", "slurmctld", "-D", "-i")
            for name in self.names:
                self.start(name)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.disconnect()
        if self.munge is not None:
            self.munge.kill()
            self.munge.wait()
        for group in sorted(self.freezer.glob("**/"), reverse=True) if self.freezer else ():
            until(partial(_remove, group), f"the processes of {group} to end")

    def start(self, name):
        """Switch a node on."""
        (self.folder / name / "spool").mkdir(parents=True, exist_ok=True)
        self.boot(name, "slurmd", "-D", "-N", name)

    def wait_for_nodes(self):
        """Wait until every node can take jobs."""

        def up():
            states = self.login("sinfo", "-h", "-N", "-o", "%t", check=False).split()
            return len(states) == len(self.names) and set(states) <= {"idle", "mix", "alloc"}

        until(up, lambda: f"nodes: {self.login('sinfo', '-N', '-l', check=False)}", 60)

    def login(self, *command, **options):
        """Run a command on the login node."""
        environment = {**os.environ, **options.pop("env", {}), "SLURM_CONF": str(self.folder / "slurm.conf")}
        return self.on("login", *command, env=environment, **options)

    def submit(self, *command, **options):
        """Run ``sbatch`` and return the number of the job."""
        return self.login("sbatch", "--parsable", *command, **options).strip()

    def job(self, number):
        """Return what is known of a job."""
        fields = dict(
            word.split("=", 1)
            for word in self.login("scontrol", "-o", "show", "job", number).split()
            if "=" in word
        )
        return Job(
            state=fields["JobState"],
            exit_code=fields["ExitCode"],
            restarts=int(fields["Restarts"]),
            nodes=fields.get("NodeList", ""),
            batch_host=fields.get("BatchHost", ""),
            reason=fields["Reason"],
            excluded=fields.get("ExcNodeList", ""),
        )

    def wait(self, number, condition=lambda job: job.over, seconds=600.0):
        """Wait until a condition holds for a job, its end by default, and return it."""
        found = []

        def holds():
            found.append(self.job(number))
            return condition(found[-1]) or (found[-1].over and found[-1])

        until(holds, lambda: f"job {number}: {found[-1]}", seconds)
        return found[-1]

    def _configure(self):
        proctrack = "proctrack/cgroup" if self.freezer else "proctrack/linuxproc"
        lines = [
            _CONFIGURATION.format(login=self.addresses["login"], folder=self.folder, proctrack=proctrack)
        ]
        for name in self.names:
            address = self.addresses[name]
            lines.append(f"NodeName={name} NodeAddr={address} CPUs={self.cpus} RealMemory=16000")
        lines.append(f"PartitionName=all Nodes={','.join(self.names)} Default=YES DefaultTime=60 State=UP")
        (self.folder / "slurm.conf").write_text("\n".join([*lines, ""]))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "plugstack.conf").write_text("")
        (self.folder / "state").mkdir()

    def _start_munge(self):
        place = self.folder / "munge"
        place.mkdir(mode=0o711)
        key = place / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        flags = {"key-file": key, "socket": place / "socket", "pid-file": place / "pid"}
        flags |= {"log-file": place / "log", "seed-file": place / "seed"}
        with (place / "output").open("w") as output:
            self.munge = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._namespace('login')}", "munged", "--foreground"]
                + [f"--{flag}={value}" for flag, value in flags.items()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        until((place / "socket").exists, lambda: f"munged: {(place / 'output').read_text()}")
        assert alive(self.munge.pid)
