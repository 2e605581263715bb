"""deploy/compose holds together: by the specification's schema, by the services' settings, and by what lies beside it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from images.compose_host import mount_of, prepare
from images.service_settings import SETTINGS

from finery_common.catalogue import Catalogue
from finery_common.settings import ServiceSettings
from finery_common.tls import VLLM_NAME
from finery_serving.settings import ServingSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
FINERY = sorted(SETTINGS)


def _text(service: dict) -> str:
    return yaml.safe_dump(service)


def _mounts(service: dict) -> dict[str, str]:
    """Target -> source, with variables at their defaults."""
    plain = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", yaml.safe_dump(service.get("volumes", []))))
    return {target: source for source, target, _ in map(mount_of, plain)}


def _environment(name: str) -> dict[str, str]:
    """What a service's container gets, with variables at their defaults."""
    return {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for key, value in SERVICES[name]["environment"].items()}


@pytest.fixture
def prepared(tmp_path) -> Path:
    """deploy/compose, after prepare.sh."""
    return prepare(tmp_path)


def test_it_is_what_the_compose_specification_allows():
    command = [
        str(Path(sys.executable).with_name("check-jsonschema")),
        "--builtin-schema",
        "vendor.compose-spec",
        str(FOLDER / "compose.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FINERY)
def test_every_variable_of_finery_is_a_setting(name):
    known = {f"FINERY_{field.upper()}" for settings in SETTINGS.values() for field in settings.model_fields}
    # What all services are given, each reads only its own of; what a service alone is given, it has to know.
    own = {f"FINERY_{field.upper()}" for field in SETTINGS[name].model_fields}
    shared = set(COMPOSE["x-environment"])
    given = set(SERVICES[name]["environment"])
    assert given - known == set()
    assert given - shared - own == set()


@pytest.mark.parametrize("name", FINERY)
def test_the_settings_are_valid_and_find_every_other_service(name, monkeypatch):
    for key, value in _environment(name).items():
        monkeypatch.setenv(key, value)
    settings = SETTINGS[name]()
    for other in ("dataprep", "trainer", "converter", "serving"):
        assert getattr(settings, f"{other}_address") == f"{other}:9000"
    assert settings.s3_endpoint.partition(":")[0] in SERVICES
    assert settings.database_url.partition("@")[2].partition(":")[0] in SERVICES


@pytest.mark.parametrize("name", FINERY)
def test_finerys_services_are_locked_in(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["image"] == f"${{REGISTRY:-localhost}}/finery-{name}:${{TAG:-0.1.0}}"
    assert "/var/lib/finery" in _mounts(service)
    assert ("gpu" in service.get("profiles", [])) == (name in ("trainer", "serving")) == ("deploy" in service)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_secrets_are_files_that_the_service_is_given_and_nothing_else_is_one(name):
    service = SERVICES[name]
    used = set(re.findall(r"/run/secrets/(\w+)", _text(service)))
    assert used == set(service.get("secrets", []))
    assert used <= set(COMPOSE["secrets"])
    plain = [key for key in service.get("environment", {}) if re.search(r"PASSWORD|SECRET|ACCESS_KEY", key) and not key.endswith("_FILE")]
    assert plain == []


def test_every_volume_secret_and_dependency_exists_and_is_used():
    named = {source for service in SERVICES.values() for source in _mounts(service).values() if not source.startswith((".", "/"))}
    assert named == set(COMPOSE["volumes"])
    assert {secret for service in SERVICES.values() for secret in service.get("secrets", [])} == set(COMPOSE["secrets"])
    for service in SERVICES.values():
        for dependency, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[dependency]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_prepare_makes_every_file_that_is_mounted_and_changes_nothing_the_second_time(prepared):
    mounted = [source for service in SERVICES.values() for source in _mounts(service).values() if source.startswith(".")]
    files = [*mounted, *(secret["file"] for secret in COMPOSE["secrets"].values()), ".env"]
    assert [file for file in files if not (prepared / file).exists()] == []
    before = {path: path.read_bytes() for path in _files(prepared / "secrets")}
    (prepared / ".env").write_text("TAG=mine\n")
    subprocess.run(["sh", str(prepared / "prepare.sh")], check=True, timeout=60)
    assert {path: path.read_bytes() for path in _files(prepared / "secrets")} == before
    assert (prepared / ".env").read_text() == "TAG=mine\n"


def test_prepare_that_was_cut_off_leaves_no_secret_that_is_empty(tmp_path):
    folder = tmp_path / "compose"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("secrets", "models", ".env"))
    (tmp_path / "openssl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "openssl").chmod(0o755)
    prepare = ["sh", str(folder / "prepare.sh")]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    failed = subprocess.run(prepare, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False, timeout=60)
    assert (failed.returncode, failed.stderr) == (1, "prepare.sh cannot make secrets/s3_access_key\n")
    # One that an older prepare.sh left.
    (folder / "secrets" / "s3_secret_key").touch()
    subprocess.run(prepare, check=True, timeout=60)
    assert [file for file in _files(folder / "secrets") if not file.stat().st_size or file.name.startswith(".")] == []


def test_secrets_are_random_long_enough_and_behind_a_closed_folder(prepared, tmp_path):
    secrets = prepared / "secrets"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in _files(secrets)} == {0o444}
    # Behind that folder the converter's user may look for tokens.
    assert stat.S_IMODE((secrets / "hub_tokens" / "default").stat().st_mode) == 0o755
    settings = ServiceSettings(token_secret_file=secrets / "token_secret")
    assert len(settings.token_secret()) == 64
    values = [path.read_text() for path in _files(secrets)]
    assert len(set(values)) == len(values)
    # MinIO's own bounds.
    assert 3 <= len((secrets / "s3_access_key").read_text().strip()) <= 20
    verify = ["openssl", "verify", "-CAfile", "vllm_ca", "-verify_hostname", VLLM_NAME, "vllm_tls_cert"]
    done = subprocess.run(verify, cwd=secrets, capture_output=True, text=True, check=False)
    assert done.stdout == "vllm_tls_cert: OK\n", done.stderr
    public = [["openssl", "pkey", "-in", "vllm_tls_key", "-pubout"], ["openssl", "x509", "-in", "vllm_tls_cert", "-noout", "-pubkey"]]
    key, certificate = (subprocess.run(command, cwd=secrets, capture_output=True, check=True).stdout for command in public)
    assert key == certificate


def test_serving_has_all_that_its_tls_port_needs(prepared, tmp_path, monkeypatch):
    given = tmp_path / "run"
    given.mkdir()
    for secret in SERVICES["serving"]["secrets"]:
        shutil.copy(prepared / COMPOSE["secrets"][secret]["file"], given / secret)
    for key, value in _environment("serving").items():
        monkeypatch.setenv(key, value.replace("/run/secrets", str(given)))
    endpoint = ServingSettings().tls()
    assert endpoint is not None
    assert (endpoint.cert_file, endpoint.key_file, endpoint.ca_file) == (given / "vllm_tls_cert", given / "vllm_tls_key", given / "vllm_ca")


def test_the_example_explains_every_variable_of_compose_and_shows_its_default():
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (FOLDER / "compose.yaml").read_text()))
    shown = dict(re.findall(r"^#(\w+)=(.*)$", (FOLDER / ".env.example").read_text(), flags=re.MULTILINE))
    assert shown == used


def test_no_image_goes_without_a_version():
    for name, service in SERVICES.items():
        image = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"])
        assert re.fullmatch(r".+:v?[^:/]*\d[^:/]*", image), name
        # A digest can be put in the place of every one.
        assert service["image"].startswith("${"), name


def test_the_catalogue_is_read_by_the_services():
    (entry,) = Catalogue.load(FOLDER / "catalogue.yaml").list()
    assert str(entry.path).startswith("/models/")


def test_prometheus_reads_its_configuration_and_scrapes_every_service():
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(FOLDER / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    finery, minio = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    targets = {config["labels"]["service"]: config["targets"] for config in finery["static_configs"]}
    assert targets == {name: [f"{name}:9100"] for name in FINERY}
    assert minio["static_configs"][0]["targets"] == [COMPOSE["x-environment"]["FINERY_S3_ENDPOINT"]]
    # Where workers write their own addresses down, Prometheus looks.
    mounts = {source: target for target, source in _mounts(SERVICES["prometheus"]).items()}
    looked_at = {str(Path(pattern).parent) for config in finery["file_sd_configs"] for pattern in config["files"]}
    for name in ("gateway", "trainer"):
        assert _mounts(SERVICES[name])["/var/lib/finery/prometheus"] == f"{name}-targets"
        assert mounts[f"{name}-targets"] in looked_at
        assert SERVICES[name]["environment"]["FINERY_METRICS_HOST"] == name


def test_an_upgrade_restarts_what_keeps_an_old_file():
    """A file that is mounted by itself stays the old one until the container starts anew; Finery's own do, by their new TAG."""
    keeps = {
        name
        for name, service in SERVICES.items()
        if name not in FINERY and any((FOLDER / source).is_file() for source in _mounts(service).values())
    }
    upgrade = (FOLDER / "README.md").read_text().partition("An upgrade, after a dump")[2].partition("The way back")[0]
    assert keeps == set(re.findall(r"docker compose restart (\S+)", upgrade)) == {"prometheus"}
