"""Images built by buildah, and their processes in a chroot as narrow as a container: for tests without a container runtime.

Owns the store of images, the base that stands in for the public one, and the walls: a read-only root, a tmpfs on /tmp, namespaces of
mounts and processes, the image's own user without capabilities. The network is the machine's, so ports are chosen by the test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/finery-test-base:bookworm"
TAG = "test"
PROGRAMS = ("buildah", "mmdebstrap", "unshare")

# Inside fresh namespaces of mounts and processes; everything is gone with them.
_WALLS = """
set -eu
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
mount --bind "$STATE" "$ROOT/var/lib/finery"
mount --bind -o ro "$INPUTS" "$ROOT/mnt"
mount -o remount,bind,ro "$ROOT"
exec chroot "$ROOT" setpriv --reuid="${OWNER%:*}" --regid="${OWNER#*:}" --clear-groups --no-new-privs --bounding-set=-all env -i "$@"
"""


def absent(programs: Sequence[str] = PROGRAMS) -> list[str]:
    """Programs that are not installed and have to be."""
    return [program for program in programs if shutil.which(program) is None]


def forbidden() -> str:
    """What this machine does not allow that building and running images takes; empty where it allows all."""
    if os.geteuid() != 0:
        return "building into a chroot takes root"
    walls = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False)
    return f"no namespaces here: {walls.stderr.strip()}" if walls.returncode else ""


@dataclass(frozen=True)
class Image:
    """One image with its root mounted at `root`; `config` is what its Dockerfile says of running it."""

    service: str
    root: Path
    config: Mapping[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    def popen(
        self,
        state: Path,
        *,
        inputs: Path,
        command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[Any] = subprocess.PIPE,
        stderr: int | IO[Any] = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Starts the image's entry point, or `command`, with `inputs` read-only at /mnt. `environment` wins over the image's."""
        variables = {**self.environment, **(environment or {})}
        inside = [f"--chdir={self.config['WorkingDir']}", *(f"{name}={value}" for name, value in variables.items())]
        walls = {"ROOT": str(self.root), "STATE": str(state), "INPUTS": str(inputs), "OWNER": self.config["User"]}
        namespaces = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        return subprocess.Popen(
            [*namespaces, "sh", "-c", _WALLS, "walls", *inside, *(command or self.config["Entrypoint"])],
            env=os.environ | walls,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    def run(self, *command: str, state: Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs `command` inside to its end."""
        with self.popen(state, inputs=state, command=command) as process:
            out, err = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def signal_first_process(outer: subprocess.Popen[str], number: int) -> None:
    """Sends a signal to the namespace's process 1, as a container runtime does."""
    (first,) = psutil.Process(outer.pid).children()
    first.send_signal(number)


class Store:
    """Images under `folder`, which must not outlive the tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        overlay = self._buildah("overlay")
        # Without overlay mounts, as on another overlay, whole copies have to do.
        works = subprocess.run([*overlay, "from", "--name", "trial", "scratch"], capture_output=True, check=False).returncode == 0
        self.builder = overlay if works else self._buildah("vfs")

    def _buildah(self, driver: str) -> list[str]:
        return [
            "buildah",
            "--storage-driver",
            driver,
            "--root",
            str(self._folder / driver),
            "--runroot",
            str(self._folder / f"{driver}-run"),
        ]

    def add_base(self) -> None:
        """Makes the base image: Debian with Python, what the Dockerfiles want of python:3-slim. Its archive is kept in `.cache`."""
        archive = ROOT / ".cache" / "images" / "bookworm-python3.tar"
        if not archive.exists():
            archive.parent.mkdir(parents=True, exist_ok=True)
            unfinished = archive.with_suffix(".unfinished.tar")
            packages = "--include=python3,python3-venv,ca-certificates"
            _checked(["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(unfinished)])
            unfinished.replace(archive)
        container = _checked([*self.builder, "from", "scratch"]).strip()
        _checked([*self.builder, "add", container, str(archive), "/"])
        _checked([*self.builder, "commit", "--format", "docker", "--rm", container, BASE])

    def images(self, action: str, *arguments: str) -> None:
        """Runs `make images`' program on this store, with the base that `add_base` made in the place of every public one."""
        bases = (f"--build-arg={name}={BASE}" for name in ("PYTHON_IMAGE", "VLLM_IMAGE"))
        builder = ["--builder", " ".join(self.builder), "--host-pip"]
        _checked([sys.executable, "tools/images.py", action, *arguments, *builder, "--tag", TAG, *bases])

    def build(self, service: str) -> Image:
        """Builds and mounts the image of `service`."""
        self.images("build", service)
        name = f"localhost/finery-{service}:{TAG}"
        container = _checked([*self.builder, "from", name]).strip()
        root = Path(_checked([*self.builder, "mount", container]).strip())
        inspected = json.loads(_checked([*self.builder, "inspect", "--type", "image", name]))
        return Image(service, root, inspected["Docker"]["config"])

    def remove(self) -> None:
        """Unmounts and deletes everything."""
        _checked([*self.builder, "rm", "--all"])
        _checked([*self.builder, "rmi", "--all", "--force"])


def _checked(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
