"""What `docker compose up` makes of compose.yaml, without Docker: each service in a chroot and a network namespace of its own.

Owns the reading of compose.yaml (a key of a service that it does not know is an error), the network with its names, volumes, secrets,
published ports, and the order of starts and stops. Images are the caller's. Restarts, the small init, Docker's own DNS, a network to the
outside, seccomp and limits of memory are not there.
"""

from __future__ import annotations

import contextlib
import graphlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from images.containers import ROOT, Image, signal_first_process

PROGRAMS = ("ip", "nsenter", "setpriv", "openssl")
_NEEDS_DOCKER = {"image", "profiles", "restart", "init"}
_READ = {"command", "cap_drop", "depends_on", "env_file", "environment", "healthcheck", "ports", "read_only", "secrets", "security_opt"}
_KNOWN = _NEEDS_DOCKER | _READ | {"shm_size", "stop_grace_period", "tmpfs", "volumes"}
_TRIAL = """
ip link add br0 type bridge && ip link add type veth && mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work /mnt/root &&
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
"""


def forbidden_network() -> str:
    """What this machine does not allow that containers' networks and layers take; empty where it allows all."""
    trial = subprocess.run(["unshare", "--mount", "--net", "sh", "-c", _TRIAL], capture_output=True, text=True, check=False)
    return f"no networks or layers here: {trial.stderr.strip()}" if trial.returncode else ""


def prepare(folder: Path) -> Path:
    """Copies deploy/ into `folder` and runs prepare.sh there; answers the folder of compose.yaml."""
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("secrets", "models", ".env", "finery.env"))
    compose = folder / "deploy" / "compose"
    subprocess.run(["sh", str(compose / "prepare.sh")], check=True, timeout=60)
    return compose


@dataclass(frozen=True)
class Substitute(Image):
    """Programs of this machine in the place of an image: what `root` has is laid over what the machine has."""


@dataclass
class Container:
    """A service's process 1 and what is around it. `mounts` are (source, target, mode); `environment` is compose.yaml's."""

    name: str
    spec: Mapping[str, Any]
    image: Image
    network: str
    folder: Path
    mounts: Sequence[tuple[Path, str, str]]
    environment: Mapping[str, str]
    process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> str:
        """The end of what it has written."""
        return (self.folder / "log").read_text(errors="replace")[-6000:]

    def start(self) -> None:
        """Returns when process 1 is behind its walls."""
        root = str(self.folder / "layer" / "root")
        command = [*self.image.config["Entrypoint"], *self.spec.get("command", [])]
        steps = [*self._walls(self.folder / "layer"), ["exec", "chroot", root, *self._as_user(command)]]
        namespaces = [*_in_network(self.network), "unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        entry = [*namespaces, "sh", "-euc", "\n".join(map(shlex.join, steps))]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(entry, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)
        while all(os.readlink(f"/proc/{inside.pid}/root") == "/" for inside in psutil.Process(self.process.pid).children()):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.log}"
            time.sleep(0.05)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs `command` inside, as `docker compose exec` does."""
        assert self.process is not None, f"{self.name} is not started"
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.log}"
        (first,) = psutil.Process(self.process.pid).children()
        inside = ["nsenter", f"--target={first.pid}", "--mount", "--pid", "--net", "--root", "--wd", *self._as_user(command)]
        return subprocess.run(inside, capture_output=True, text=True, check=False, timeout=60)

    def wait_healthy(self) -> None:
        """Returns when its check says so, at once where it has none. Docker grants it the start period and as many failures as retries."""
        own = self.image.config.get("Healthcheck") or {}
        check = {"test": own.get("Test", []), "start_period": own.get("StartPeriod", 0), "interval": own.get("Interval", 30 * 10**9)}
        check |= {"retries": own.get("Retries", 3)} | self.spec.get("healthcheck", {})
        grace_s = _seconds(check["start_period"]) + check["retries"] * _seconds(check["interval"])
        deadline_s = time.monotonic() + grace_s
        while check["test"] and (asked := self.execute(*check["test"][1:])).returncode != 0:
            assert time.monotonic() < deadline_s, f"{self.name} is not healthy after {grace_s:.0f} s: {asked.stderr}\n{self.log}"
            time.sleep(1)

    def stop(self) -> int:
        """Tells process 1 to end; answers its exit status, or SIGKILL's where its time was not enough."""
        process, self.process = self.process, None
        assert process is not None, f"{self.name} is not started"
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            signal_first_process(process, self.image.config.get("StopSignal", signal.SIGTERM))
        try:
            return process.wait(_seconds(self.spec.get("stop_grace_period", "10s")))
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _as_user(self, command: Sequence[str]) -> list[str]:
        user, _, group = self.image.config["User"].partition(":")
        limits = ["--bounding-set=-all"] if self.spec.get("cap_drop") == ["ALL"] else []
        limits += ["--no-new-privs"] if "no-new-privileges:true" in self.spec.get("security_opt", []) else []
        variables = (f"{name}={value}" for name, value in {**self.image.environment, **self.environment}.items())
        inside = ["env", "-i", f"--chdir={self.image.config['WorkingDir']}", *variables]
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *limits, *inside, *command]

    def _walls(self, layer: Path) -> Iterator[list[str]]:
        root = layer / "root"
        lower = "/" if isinstance(self.image, Substitute) else self.image.root
        yield ["mkdir", "-p", str(layer)]
        yield ["mount", "-t", "tmpfs", "tmpfs", str(layer)]
        yield ["mkdir", f"{layer}/upper", f"{layer}/work", str(root)]
        yield ["mount", "-t", "overlay", "-o", f"lowerdir={lower},upperdir={layer}/upper,workdir={layer}/work", "overlay", str(root)]
        if isinstance(self.image, Substitute):
            yield ["cp", "-aL", f"{self.image.root}/.", str(root)]
        yield ["mount", "-t", "proc", "proc", f"{root}/proc"]
        yield ["mount", "--rbind", "/dev", f"{root}/dev"]
        yield ["mount", "-t", "tmpfs", "-o", f"size={self.spec.get('shm_size', '64mb').rstrip('b')}", "tmpfs", f"{root}/dev/shm"]
        for tmpfs in self.spec.get("tmpfs", []):
            target, _, options = tmpfs.partition(":")
            yield ["mount", "-t", "tmpfs", "-o", f"nosuid,nodev,noexec,{options}", "tmpfs", f"{root}{target}"]
        # A folder before what is mounted in it.
        for source, target, mode in sorted(self.mounts, key=lambda mount: mount[1]):
            place = Path(f"{root}{target}")
            yield ["mkdir", "-p", str(place if source.is_dir() else place.parent)]
            if source.is_file():
                yield ["touch", str(place)]
            yield ["mount", "--bind", str(source), str(place)]
            yield ["mount", "-o", f"remount,bind,{mode}", str(place)]
        yield ["mount", "-o", f"remount,bind,{'ro' if self.spec.get('read_only') else 'rw'}", str(root)]


class ComposeHost:
    """Runs those services of a prepared `folder` that `images` has an image for, within `network`; what is theirs lies in `state`."""

    def __init__(self, folder: Path, images: Mapping[str, Image], *, state: Path) -> None:
        self._folder, self._state = folder, state
        chosen = _variables(folder / ".env")
        text = (folder / "compose.yaml").read_text()
        self._spec = yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: chosen.get(found[1]) or found[2], text))
        self._namespace = f"finery-{os.getpid()}"
        self._addresses = {name: f"10.0.0.{number}" for number, name in enumerate(images, start=2)}
        names = "".join(f"{address} {name}\n" for name, address in self._addresses.items())
        (state / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (state / "resolv.conf").touch()
        self.containers = {name: self._container(name, image) for name, image in images.items()}
        needs = {name: container.spec.get("depends_on", {}) for name, container in self.containers.items()}
        self._order = list(graphlib.TopologicalSorter(needs).static_order())
        self._proxies: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Starts each when those it depends on are healthy; returns when all are."""
        for name in self._order:
            for other in self.containers[name].spec.get("depends_on", {}):
                self.containers[other].wait_healthy()
            self.containers[name].start()
        for container in self.containers.values():
            container.wait_healthy()

    def stop(self) -> dict[str, int]:
        """Stops all that run, whoever depends on others first; answers their exit statuses."""
        return {name: self.containers[name].stop() for name in reversed(self._order) if self.containers[name].process is not None}

    def published(self, service: str, port: int) -> str:
        """host:port of this machine at which a service's own `port` is."""
        (found,) = [line for line in self.containers[service].spec["ports"] if line.endswith(f":{port}")]
        return found.rpartition(":")[0]

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """A bridge with every service on it, and the ports that are published; stops what runs at its end."""
        try:
            self._connect(f"{self._namespace}-bridge")
            yield
        finally:
            self.stop()
            for proxy in self._proxies:
                proxy.kill()
                proxy.wait()
            for name in ("bridge", *self.containers):
                subprocess.run(["ip", "netns", "delete", f"{self._namespace}-{name}"], capture_output=True, check=False)

    def _connect(self, bridge: str) -> None:
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "up", "type", "bridge")
        _ip("-n", bridge, "addr", "add", "10.0.0.1/24", "dev", "br0")
        for number, (name, address) in enumerate(self._addresses.items()):
            own = self.containers[name].network
            _ip("netns", "add", own)
            _ip("-n", own, "link", "set", "lo", "up")
            _ip("-n", bridge, "link", "add", f"veth{number}", "master", "br0", "up", "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", own, "link", "set", "eth0", "up")
            for host, port, target in (line.split(":") for line in self.containers[name].spec.get("ports", [])):
                with socket.create_server((host, int(port))) as listener:
                    program = [sys.executable, str(Path(__file__).with_name("published_port.py")), str(listener.fileno()), address, target]
                    self._proxies.append(subprocess.Popen([*_in_network(bridge), *program], pass_fds=[listener.fileno()]))

    def _container(self, name: str, image: Image) -> Container:
        spec = self._spec["services"][name]
        assert set(spec) <= _KNOWN, f"{name}: {set(spec) - _KNOWN} are not known here"
        (self._state / name).mkdir()
        mounts = [(self._state / file, f"/etc/{file}", "rw") for file in ("hosts", "resolv.conf")]
        mounts += [(self._folder / self._spec["secrets"][item]["file"], f"/run/secrets/{item}", "ro") for item in spec.get("secrets", [])]
        for source, target, mode in map(mount_of, spec.get("volumes", [])):
            is_path = source.startswith((".", "/"))
            place = (self._folder / source).resolve() if is_path else self._volume(source, image.root / target.lstrip("/"))
            mounts.append((place, target, mode))
        environment: dict[str, str] = {}
        for file in spec.get("env_file", []):
            environment |= _variables(self._folder / file["path"])
        environment |= spec.get("environment", {})
        return Container(name, spec, image, f"{self._namespace}-{name}", self._state / name, mounts, environment)

    def _volume(self, name: str, original: Path) -> Path:
        """As Docker has it, an empty volume gets what the image has at that place, owner and mode too; else it is root's."""
        assert name in self._spec["volumes"]
        folder = self._state / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        if original.is_dir() and not any(folder.iterdir()):
            subprocess.run(["cp", "-a", f"{original}/.", str(folder)], check=True)
        return folder


def mount_of(volume: str | dict[str, Any]) -> tuple[str, str, str]:
    """Source, target and mode ("ro" or "rw") of a volume in the short form, or of a bind in the long one."""
    if isinstance(volume, str):
        source, target, *mode = volume.split(":")
        return source, target, mode[0] if mode else "rw"
    assert (volume["type"], volume["bind"]) == ("bind", {"create_host_path": False}), f"{volume} is not known here"
    return volume["source"], volume["target"], "ro" if volume["read_only"] else "rw"


def _variables(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _seconds(duration: str | int) -> float:
    """Of compose's form, or of an image's nanoseconds."""
    return duration / 1e9 if isinstance(duration, int) else float(duration.removesuffix("s"))


def _in_network(namespace: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{namespace}"]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
