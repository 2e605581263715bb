"""compose.yaml by Docker itself, where `FINERY_TEST_DOCKER=1` asks for it: this user's `docker` with Compose from 2.24 on.

Owns the project, which is the test's own, and images in the places of those of other registries: SeaweedFS, and PostgreSQL and Prometheus
as Debian 13 has them. Leaves out what there is no image for: Grafana, and what the profile `gpu` adds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from images import substitutes
from images.containers import TAG, Store

WANTED = "FINERY_TEST_DOCKER"
_OURS = ("gateway", "dataprep", "converter")
_POSTGRES = Path("/usr/lib/postgresql/17/bin")
_START_S = 300.0
# Run in the root that is being made: what the images of others have beside Debian's packages.
_FOLDERS = """
set -eu
mkdir -p "$1/prometheus" "$1/var/lib/postgresql/data" "$1/usr/local/bin"
chown 65534:65534 "$1/prometheus"
chroot "$1" chown postgres:postgres /var/lib/postgresql/data
cp "$WEED" "$1/usr/local/bin/weed"
printf %s "$CHECK" >"$1/usr/local/bin/mc"
chmod 755 "$1/usr/local/bin/mc"
"""


def load_images(store: Store, folder: Path) -> Mapping[str, str]:
    """Hands Docker ours and the substitutes; answers what `.env` has to say of them."""
    for service in _OURS:
        store.images("build", service)
        name, archive = f"localhost/finery-{service}:{TAG}", folder / f"{service}.tar"
        _checked([*store.builder, "push", name, f"docker-archive:{archive}:{name}"])
        _checked(["docker", "load", "--input", str(archive)])
        archive.unlink()
    root = folder / "substitutes.tar"
    hook = f'--customize-hook=sh -c {shlex.quote(_FOLDERS)} folders "$1"'
    packages = "--include=postgresql,prometheus"
    environment = os.environ | {"WEED": str(Path(sys.executable).with_name("weed")), "CHECK": substitutes.STORE_CHECK}
    _checked(["mmdebstrap", "--quiet", "--variant=minbase", packages, hook, "trixie", str(root)], environment=environment)
    path = f"PATH=/usr/local/bin:{_POSTGRES}:/usr/bin:/bin"
    return {"TAG": TAG} | {
        f"{name.upper()}_IMAGE": _imported(root, f"localhost/finery-test-{name}:{TAG}", [f"ENV {path}", *changes])
        for name, changes in {
            "minio": [_entry(["sh", "-euc", substitutes.STORE, "minio"])],
            "postgres": [_entry(["sh", "-euc", substitutes.POSTGRES, "postgres"]), "ENV PGDATA=/var/lib/postgresql/data", "USER postgres"],
            "prometheus": [_entry(["prometheus"]), "USER 65534:65534"],
        }.items()
    }


@dataclass(frozen=True)
class DockerContainer:
    """A service's container."""

    host: DockerHost
    name: str

    @property
    def log(self) -> str:
        """The end of what it has written."""
        return self.host.compose("logs", "--no-color", "--tail", "50", self.name)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs `command` inside."""
        return self.host.run("exec", "--no-TTY", self.name, *command)

    def kill(self) -> None:
        """Kills its first process, as the kernel would: Docker does not count it as a stop that was asked for."""
        container = self.host.compose("ps", "--quiet", self.name).strip()
        first = _checked(["docker", "inspect", "--format", "{{.State.Pid}}", container]).strip()
        _checked(["kill", "-KILL", first])


class DockerHost:
    """A prepared `folder` as a project of its own, without the services that have no image here."""

    def __init__(self, folder: Path, services: Sequence[str]) -> None:
        self._folder = folder
        self._project = f"finery-test-{os.getpid()}"
        self.containers = {name: DockerContainer(self, name) for name in services}

    def up(self) -> None:
        """Returns when all are healthy."""
        self.compose("up", "--detach", "--wait", "--pull=never", *self.containers)

    def stop(self) -> dict[str, int]:
        """Stops all; answers their exit statuses."""
        self.compose("stop")
        rows = [json.loads(line) for line in self.compose("ps", "--all", "--format", "json").splitlines()]
        return {row["Service"]: row["ExitCode"] for row in rows}

    def published(self, service: str, port: int) -> str:
        """host:port of this machine at which a service's own `port` is."""
        return self.compose("port", service, str(port)).strip()

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Nothing of the project is left at its end."""
        try:
            yield
        finally:
            self.compose("down", "--volumes")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`docker compose` with `arguments`."""
        command = ["docker", "compose", "--project-name", self._project, *arguments]
        return subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=_START_S)

    def compose(self, *arguments: str) -> str:
        """What it printed. It has to succeed."""
        done = self.run(*arguments)
        assert done.returncode == 0, f"docker compose {' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout


def _entry(command: Sequence[str]) -> str:
    return f"ENTRYPOINT {json.dumps(command)}"


def _imported(root: Path, name: str, changes: Sequence[str]) -> str:
    _checked(["docker", "import", *(f"--change={change}" for change in changes), str(root), name])
    return name


def _checked(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
