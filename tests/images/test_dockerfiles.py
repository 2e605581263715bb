"""The Dockerfiles agree with one another, with the settings and with pyproject.toml; those that no test builds are held to that too."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from images.service_settings import SETTINGS
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SERVICES = sorted(SETTINGS)


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"under_test_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


images = _load("tools/images.py")
requirements = _load("docker/requirements.py")


def _instructions(service: str) -> list[str]:
    """Lines that continue are joined, comments left out."""
    text = (ROOT / "docker" / f"{service}.Dockerfile").read_text()
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [line for line in re.sub(r"\\\n\s*", "", plain).splitlines() if line]


def _environment(service: str) -> dict[str, str]:
    (line,) = (line for line in _instructions(service) if line.startswith("ENV "))
    return dict(item.split("=", 1) for item in line.split()[1:])


def test_there_is_one_for_every_service_and_hadolint_finds_nothing():
    files = sorted((ROOT / "docker").glob("*.Dockerfile"))
    assert [file.name.partition(".")[0] for file in files] == sorted([*SERVICES, "sbom"])
    assert set(images.SERVICES) == set(SERVICES)
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), *map(str, files)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_runs_its_service_as_a_user_without_rights_on_a_base_that_can_be_pinned(service):
    lines = _instructions(service)
    argument = {"trainer": "CUDA_IMAGE", "serving": "VLLM_IMAGE"}.get(service, "PYTHON_IMAGE")
    assert lines[0].startswith(f"ARG {argument}=docker.io/")
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert set(bases) <= {f"${{{argument}}}", "base"}
    assert len(bases) > 1
    last = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert last[0].endswith(" AS runtime")
    # Nothing is installed in the stage that is kept.
    assert [line for line in last if line.startswith("RUN")] == []
    assert "USER 10001:10001" in last
    assert last[-1] == f'ENTRYPOINT ["python", "-m", "finery_{service}"]'


@pytest.mark.parametrize("service", SERVICES)
def test_an_images_environment_is_one_that_its_service_reads(service, monkeypatch):
    environment = _environment(service)
    known = {f"FINERY_{field.upper()}" for field in SETTINGS[service].model_fields}
    assert {name for name in environment if name.startswith("FINERY_")} <= known
    for name in list(os.environ):
        if name.startswith("FINERY_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("FINERY_"):
            monkeypatch.setenv(name, value)
    settings = SETTINGS[service]()
    assert str(settings.state_dir) == "/var/lib/finery"
    assert (settings.metrics_host, settings.metrics_port) == ("0.0.0.0", 9100)
    assert settings.grpc_address == ("0.0.0.0:8081" if service == "gateway" else "0.0.0.0:9000")
    assert environment["PYTHONSAFEPATH"] == "1"
    shared = {name: value for name, value in environment.items() if not name.startswith("FINERY_") and name != "CC"}
    assert shared == {name: value for name, value in _environment("gateway").items() if not name.startswith("FINERY_")}


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_installs_the_extra_of_its_service(service):
    (line,) = (line for line in _instructions(service) if "install.sh dependencies" in line)
    arguments = re.search(r"install\.sh dependencies(.*?)(&&|$)", line)
    assert arguments is not None
    words = arguments[1].split()
    extras = [word for word in words if not word.startswith("--") and not word.endswith(".txt")]
    assert extras[0] == service
    assert requirements.requirements((ROOT / "pyproject.toml").read_text(), extras)
    assert ("--override" in words) == (service == "trainer")


def test_the_trainers_pins_are_allowed_by_the_project_and_replace_the_others():
    override = (ROOT / "constraints-gpu.txt").read_text()
    pins = requirements.constraints((ROOT / "constraints.txt").read_text(), override=override)
    versions = {requirements._distribution(pin): pin.partition("==")[2] for pin in pins}
    assert len(versions) == len(pins)
    assert versions["torch"] == "2.11.0"
    assert versions["triton"] == "3.6.0"
    for line in requirements.requirements((ROOT / "pyproject.toml").read_text(), ["trainer", "gpu"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[requirements._distribution(requirement.name)]), line


def test_a_name_is_one_however_it_is_written():
    assert requirements.constraints("pydantic_core==1\n# why\nPyYAML==6\n", override="pydantic-core==2\n") == [
        "pydantic-core==2",
        "PyYAML==6",
    ]


def test_docker_is_told_what_to_build_from_and_under_which_name():
    order = images.Order(builder=("docker",), registry="registry.internal/ml/", tag="2", build_args={"PYTHON_IMAGE": "python@sha256:0"})
    command = order.build("gateway")
    assert command[:2] == ["docker", "build"]
    assert "--build-arg=PYTHON_IMAGE=python@sha256:0" in command
    assert command[command.index("--tag") + 1] == "registry.internal/ml/finery-gateway:2"
    assert command[command.index("--file") + 1 :] == ["docker/gateway.Dockerfile", "."]
    assert images.Order(builder=("docker",), registry="", tag="2", build_args={}).image("serving") == "finery-serving:2"


def test_buildah_keeps_health_checks_and_needs_no_runtime():
    order = images.Order(builder=("buildah", "--root", "/r"), registry="", tag="1", build_args={}, options=("--volume=/a:/a:ro",))
    command = order.build("gateway")
    assert command[:4] == ["buildah", "--root", "/r", "bud"]
    assert command[command.index("--isolation") + 1] == "chroot"
    assert command[command.index("--format") + 1] == "docker"
    assert "--volume=/a:/a:ro" in command


def test_pips_settings_are_taken_over_with_the_files_that_they_name(tmp_path):
    wheels, index = tmp_path / "wheels", tmp_path / "mirror" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    listed = f"global.find-links='{wheels}\\n/not/there'\n:env:.timeout='180'\nglobal.timeout='15'\nglobal.extra-index-url='file://{index} https://mirror/simple'\n"
    settings = images.pip_settings(listed)
    assert settings["timeout"] == "180"
    assert settings["find-links"].split() == [str(wheels), "/not/there"]
    # An index lists files that lie beside it.
    assert images.local_paths(settings.values()) == [index.parent, wheels]


def test_unknown_services_and_options_that_docker_lacks_are_refused():
    for arguments, words in ((["build", "kernel"], "got the services kernel"), (["build", "--host-pip"], "use --builder buildah")):
        command = [sys.executable, str(ROOT / "tools" / "images.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert words in done.stderr


def test_nothing_but_what_images_are_made_from_is_sent_to_the_builder():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert all(list(ROOT.glob(pattern)) for pattern in let_in)
    copied = {
        word
        for service in [*SERVICES, "sbom"]
        for line in _instructions(service)
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    for source in copied:
        assert any(Path(source).match(pattern) or pattern.startswith(f"{source}/") for pattern in let_in), source
