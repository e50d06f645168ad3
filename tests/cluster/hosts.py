"""Machines out of namespaces: own network, host name, process table, mounts; one file system.

Needs root, ``ip`` (iproute2), ``unshare`` and ``nsenter`` (util-linux). A machine can be switched
off, and its network cable pulled.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

# PID 1 of a machine: starts its services, and takes in the orphans of those that end.
_INIT = """
hostname "$NAME"
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/nsswitch.conf" /etc/nsswitch.conf
if [ -n "$FREEZER" ]
then mount --bind "$FREEZER" /sys/fs/cgroup/freezer
else mount -t tmpfs -o mode=755 none /sys/fs/cgroup
fi
cd /
trap 'exit 0' TERM
"$@" &
touch "$FOLDER/$NAME/up"
while :; do wait -n 2>/dev/null || sleep 1; done
"""


def until(condition, what, seconds=30.0):
    """Wait until ``condition()`` is true, and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} seconds for {what() if callable(what) else what}")
        time.sleep(0.05)
    return found


def alive(pid):
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Hosts:
    """A switch, named ``login`` with an address of its own, and machines plugged into it.

    ``freezer`` is a control group that they take for the root of that hierarchy.
    """

    def __init__(self, folder, names, *, network="10.213.8", freezer=None):
        self.folder, self.names, self.freezer = Path(folder), names, freezer
        self.addresses = {"login": f"{network}.1"}
        self.addresses |= {name: f"{network}.{11 + i}" for i, name in enumerate(names)}
        self.prefix = f"periln{os.getpid()}"
        self.pids = {}

    def connect(self):
        """Make the network."""
        table = ["127.0.0.1 localhost"]
        for name, address in self.addresses.items():
            # The mapped form too: torch's rendezvous asks for its name.
            table += [f"{address} {name}", f"::ffff:{address} {name}"]
        (self.folder / "hosts").write_text("\n".join([*table, ""]))
        switch = Path("/etc/nsswitch.conf").read_text().splitlines()
        switch = [line for line in switch if not line.startswith("hosts:")]
        (self.folder / "nsswitch.conf").write_text("\n".join([*switch, "hosts: files", ""]))
        login = self._namespace("login")
        for name, address in self.addresses.items():
            _run("ip", "netns", "add", self._namespace(name))
            _run("ip", "-n", self._namespace(name), "link", "set", "lo", "up")
            if name == "login":
                device = "switch"
                _run("ip", "-n", login, "link", "add", device, "type", "bridge")
            else:
                device, peer = "eth0", ["peer", "name", "eth0", "netns", self._namespace(name)]
                _run("ip", "-n", login, "link", "add", name, "type", "veth", *peer)
                _run("ip", "-n", login, "link", "set", name, "master", "switch", "up")
            _run("ip", "-n", self._namespace(name), "address", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", self._namespace(name), "link", "set", device, "up")

    def disconnect(self):
        """End whatever still runs on the machines, and remove the network."""
        for name in list(self.pids):
            self.power_off(name)
        for name in self.addresses:
            namespace = self._namespace(name)
            found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    def boot(self, name, *service):
        """Switch a machine on, with one service."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        (place / "up").unlink(missing_ok=True)
        environment = {
            "NAME": name,
            "FOLDER": str(self.folder),
            "FREEZER": str(self.freezer or ""),
            "PATH": os.environ["PATH"],
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        kinds = ["--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(name)}"]
        with (place / "boot.log").open("a") as log:
            launcher = subprocess.Popen(
                [*enter, "unshare", *kinds, "bash", "-c", _INIT, "init", *service],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until((place / "up").exists, lambda: f"{name} to boot: {(place / 'boot.log').read_text()}")
        self.pids[name] = (launcher, _child(launcher.pid))

    def power_off(self, name):
        """Switch a machine off: everything on it is gone at once."""
        launcher, pid = self.pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        launcher.wait()

    def unplug(self, name):
        """Pull a machine's network cable; everything on it goes on."""
        _run("ip", "-n", self._namespace("login"), "link", "set", name, "down")

    def plug(self, name):
        """Put the cable back."""
        _run("ip", "-n", self._namespace("login"), "link", "set", name, "up")

    def on(self, name, *command, check=True, **options):
        """Run a command on a machine, and return its output."""
        inside = ["nsenter", "-t", str(self.pids[name][1]), "--uts", "--mount", "--pid", "--net"]
        finished = subprocess.run(
            [*inside, f"--wd={options.get('cwd', Path.cwd())}", "--", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )
        if check and finished.returncode:
            raise AssertionError(f"{command} on {name}: {finished.stdout}{finished.stderr}")
        return finished.stdout

    def _namespace(self, name):
        return f"{self.prefix}-{name}"


def _child(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(until(lambda: children.read_text().split(), f"a child of {pid}")[0])


def _run(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)
