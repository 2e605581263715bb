"""Builds the images of `docker/` and lists what is in them: `images.py build|sbom [SERVICE…]`; `make images` and `make sbom` call it.

Owns names and tags, what a builder is told, and handing this machine's pip configuration to buildah for places where pip has to ask a
mirror. What is in an image is its Dockerfile's affair. Needs Python's own modules only.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
SERVICES: tuple[str, ...] = ("gateway", "dataprep", "trainer", "converter", "serving")
# Without user namespaces or a container runtime, as on a build machine that is a container itself.
_BUILDAH = ("bud", "--isolation", "chroot", "--format", "docker", "--layers=false")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be built, and by whom. `builder` is a command: `docker`, or `buildah` with its global options."""

    builder: tuple[str, ...]
    registry: str
    tag: str
    build_args: Mapping[str, str]
    options: tuple[str, ...] = ()

    def image(self, service: str) -> str:
        """The image's full name."""
        return f"{self.registry.rstrip('/')}/finery-{service}:{self.tag}".lstrip("/")

    def build(self, service: str) -> list[str]:
        """The command that builds `service`'s image."""
        return [*self._start(self.build_args), "--target", "runtime", "--tag", self.image(service), "--file", _dockerfile(service), "."]

    def sbom(self, service: str, folder: Path) -> list[str]:
        """The command that writes what is in `service`'s image to `folder`."""
        arguments = {**self.build_args, "IMAGE": self.image(service), "NAME": f"finery-{service}"}
        return [*self._start(arguments), "--output", f"type=local,dest={folder}", "--file", _dockerfile("sbom"), "."]

    def _start(self, build_args: Mapping[str, str]) -> list[str]:
        command = [*self.builder, "build"] if Path(self.builder[0]).name == "docker" else [*self.builder, *_BUILDAH]
        arguments = (f"--build-arg={name}={value}" for name, value in build_args.items())
        return [*command, *arguments, *self.options]


def version() -> str:
    """Finery's, by pyproject.toml: the tag where none is given."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def revision() -> str:
    """The commit that is built, marked where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@contextmanager
def host_pip() -> Iterator[tuple[str, ...]]:
    """Options by which buildah lets pip inside find what pip finds on this machine: its configuration, and the files that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = pip_settings(listed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pip.conf"
        file.touch(mode=0o600)
        lines = (f"{name} = " + "\n    ".join(value.split()) for name, value in settings.items())
        file.write_text("[global]\n" + "\n".join(lines) + "\n")
        mounts = {path: path for path in local_paths(settings.values())} | {file: Path("/etc/pip.conf")}
        yield tuple(f"--volume={source}:{target}:ro" for source, target in mounts.items())


def pip_settings(listed: str) -> dict[str, str]:
    """What `pip config list` says, by option; what the environment sets wins."""
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, is_setting, value = line.partition("=")
        if is_setting:
            found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    return found


def local_paths(values: Iterable[str]) -> list[Path]:
    """This machine's files and folders that `values` name; for an index by its file URL the folder above, where its files are."""
    words = [word for value in values for word in value.split()]
    plain = {Path(word) for word in words if word.startswith("/")}
    indexes = {Path(urlsplit(word).path).parent for word in words if word.startswith("file:")}
    return sorted(path for path in plain | indexes if path.exists())


def _dockerfile(name: str) -> str:
    return f"docker/{name}.Dockerfile"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["build", "sbom"])
    parser.add_argument("services", nargs="*", metavar="SERVICE", help=f"of {', '.join(SERVICES)}; all where none is named")
    parser.add_argument("--builder", default="docker", help="docker, or buildah with its global options in one argument")
    parser.add_argument("--registry", default="", help="what stands before the images' names")
    parser.add_argument("--tag", default="", help="Finery's version where not given")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="PYTHON_IMAGE, CUDA_IMAGE, VLLM_IMAGE, …")
    parser.add_argument("--host-pip", action="store_true", help="buildah only: pip inside is set up as on this machine")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sbom", help="folder of `sbom`")
    return parser


def _commands(arguments: argparse.Namespace, order: Order) -> Iterator[list[str]]:
    unknown = sorted(set(arguments.services) - set(SERVICES))
    if unknown:
        raise SystemExit(f"images.py: got the services {', '.join(unknown)}, wanted some of {', '.join(SERVICES)}")
    for service in arguments.services or SERVICES:
        yield order.build(service) if arguments.action == "build" else order.sbom(service, arguments.output)


def main() -> int:
    """Runs a command for every image until one fails; answers the exit status."""
    arguments = _parser().parse_args()
    build_args = {"VERSION": version(), "REVISION": revision(), **dict(item.split("=", 1) for item in arguments.build_arg)}
    builder = tuple(arguments.builder.split())
    if arguments.host_pip and Path(builder[0]).name == "docker":
        raise SystemExit("images.py: --host-pip mounts files while it builds, which docker does not; use --builder buildah")
    order = Order(builder=builder, registry=arguments.registry, tag=arguments.tag or version(), build_args=build_args)
    if not arguments.host_pip:
        return _run(_commands(arguments, order))
    with host_pip() as options:
        return _run(_commands(arguments, replace(order, options=options)))


def _run(commands: Iterator[list[str]]) -> int:
    statuses = (subprocess.run(command, cwd=ROOT, check=False).returncode for command in commands)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
