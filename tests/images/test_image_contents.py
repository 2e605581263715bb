"""What is in the images and what is not, and what their configuration says."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BUILT = ["gateway", "dataprep", "converter", "serving"]
COMPILERS = {"cc", "c++", "gcc", "g++", "clang", "tcc", "ld", "as", "make", "ninja", "nvcc", "go", "rustc"}


def _files(root: Path) -> list[Path]:
    return [Path(folder, name) for folder, _, names in os.walk(root) for name in names]


@pytest.fixture
def state(tmp_path) -> Path:
    os.chown(tmp_path, 10001, 10001)
    return tmp_path


@pytest.mark.parametrize("service", BUILT)
def test_an_image_has_what_its_service_needs_and_nothing_to_build_with(service, image_of):
    root = image_of(service).root
    programs = {path.name for folder in ("usr/bin", "usr/sbin", "usr/local/bin", "opt/finery/bin") for path in (root / folder).glob("*")}
    assert programs & COMPILERS == set()
    files = _files(root / "opt") + _files(root / "var" / "lib" / "finery") + _files(root / "tmp") + _files(root / "root")
    inside = [path.relative_to(root).as_posix() for path in files]
    assert [path for path in inside if "/finery_" in path and "/tests/" in path] == []
    assert [path for path in inside if ".cache/pip" in path or path.endswith(".whl")] == []
    assert not list(root.glob("opt/finery/lib/python3*/site-packages/pip"))
    assert not (root / "build").exists()
    assert not (root / "opt/finery/bin/finery").exists()
    assert list(root.glob(f"opt/finery/lib/python3*/site-packages/finery_{service}/__main__.py"))
    assert (root / "opt/finery/bin/python").exists() or (root / "opt/finery/bin/python").is_symlink()


@pytest.mark.parametrize("service", BUILT)
def test_the_user_owns_the_state_directory_alone(service, image_of):
    root = image_of(service).root
    state = root / "var" / "lib" / "finery"
    assert {path.relative_to(state).as_posix(): path.stat().st_uid for path in (state, *state.rglob("*"))} == {
        ".": 10001,
        "prometheus": 10001,
    }
    code = [path for path in _files(root / "opt") if not path.is_symlink()]
    assert {path.stat().st_uid for path in code} == {0}
    assert [path for path in code if stat.S_IMODE(path.stat().st_mode) & 0o022] == []
    assert "finery:x:10001:10001:" in (root / "etc" / "passwd").read_text()


@pytest.mark.parametrize("service", BUILT)
def test_the_configuration_says_how_it_is_run_and_what_it_is(service, image_of):
    image = image_of(service)
    assert image.config["User"] == "10001:10001"
    assert image.config["Entrypoint"] == ["python", "-m", f"finery_{service}"]
    ports = {"gateway": {"8080/tcp", "8081/tcp", "9100/tcp"}, "serving": {"8443/tcp", "9000/tcp", "9100/tcp"}}
    assert set(image.config["ExposedPorts"]) == ports.get(service, {"9000/tcp", "9100/tcp"})
    assert image.environment["FINERY_GRPC_ADDRESS"] == ("0.0.0.0:8081" if service == "gateway" else "0.0.0.0:9000")
    assert image.environment["FINERY_METRICS_PORT"] == "9100"
    assert image.environment["PYTHONSAFEPATH"] == "1"
    labels = {name.rpartition(".")[2]: value for name, value in image.config["Labels"].items() if name.startswith("org.opencontainers.")}
    assert labels["title"] == f"finery-{service}"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == "0.1.0"
    assert len(labels["revision"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize("service", BUILT)
def test_only_the_state_directory_and_tmp_can_be_written(service, image_of, state):
    probe = (
        "import os\n"
        "for folder in ('/', '/opt/finery', '/etc', '/var/lib', '/usr', '/mnt', '/var/lib/finery', '/tmp'):\n"
        "    try:\n"
        "        open(f'{folder}/probe', 'w').close()\n"
        "        print(folder)\n"
        "    except OSError: pass\n"
    )
    done = image_of(service).run("python", "-c", probe, state=state)
    assert (done.stdout.split(), done.stderr) == (["/var/lib/finery", "/tmp"], "")


def test_the_converters_image_has_torch_for_cpus_and_its_gguf_converter_runs(image_of, state):
    image = image_of("converter")
    torch = image.run("python", "-c", "import torch; print(torch.__version__, torch.version.cuda)", state=state, timeout_s=300)
    assert torch.stdout.split()[0].endswith("+cpu"), torch.stderr
    assert torch.stdout.split()[1] == "None"
    folder = image.environment["FINERY_CONVERT_HF_TO_GGUF"]
    environment = {"PYTHONPATH": folder}
    command = ["python", f"{folder}/convert_hf_to_gguf.py", "--print-supported-models"]
    with image.popen(state, inputs=state, command=command, environment=environment) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "LlamaForCausalLM" in err


def test_the_bill_of_materials_lists_what_is_installed(image_store, image_of, state, tmp_path):
    image = image_of("dataprep")
    image_store.images("sbom", "dataprep", "--output", str(tmp_path / "sbom"))
    text = (tmp_path / "sbom" / "finery-dataprep.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["name"] == "finery-dataprep"
    listed = {component["purl"] for component in bill["components"]}
    script = "import importlib.metadata as m; print(*(f'{d.name}@{d.version}' for d in m.distributions()))"
    installed = image.run("python", "-c", script, state=state).stdout.split()
    assert len(installed) > 20
    assert {f"pkg:pypi/{item.lower().replace('_', '-')}" for item in installed} <= listed
    command = ["dpkg-query", "--show", "--showformat=${Package}@${Version} "]
    debian = {item.partition("@")[0] for item in image.run(*command, state=state).stdout.split()}
    assert {"libc6", "python3"} <= debian
    named = {component["name"] for component in bill["components"] if component["purl"].startswith("pkg:deb/debian/")}
    assert named == debian
