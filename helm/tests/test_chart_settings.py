"""Every FINERY_ variable that the chart sets is one that the process which gets it reads, with a value that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chart_rendering import CASES, Manifests

from finery_common.settings import ServiceSettings
from finery_converter.settings import ConverterSettings
from finery_dataprep.settings import DataprepSettings
from finery_gateway.settings import GatewaySettings
from finery_gateway.wiring import targets_of
from finery_serving.settings import ServingSettings
from finery_trainer.settings import TrainerSettings, WorkerSettings

SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "dataprep": DataprepSettings,
    "trainer": TrainerSettings,
    "converter": ConverterSettings,
    "serving": ServingSettings,
    "serving-follower": ServingSettings,
    "worker": WorkerSettings,
    "base-weights": ServiceSettings,
}


def environments(manifests: Manifests) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of Finery's own containers: where, the component, and the entries by name."""
    for where, template in manifests.pods:
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        if component in SETTINGS:
            entries = template["spec"]["containers"][0]["env"]
            names = [entry["name"] for entry in entries]
            assert len(names) == len(set(names)), where
            yield where, component, {entry["name"]: entry for entry in entries}


def mounted_below(folder: str, template: dict[str, Any]) -> set[str]:
    """Names of the files that the first container finds in a folder that is a projected volume."""
    spec = template["spec"]
    (volume,) = (mount["name"] for mount in spec["containers"][0]["volumeMounts"] if mount["mountPath"] == folder)
    (sources,) = (item["projected"]["sources"] for item in spec["volumes"] if item["name"] == volume)
    return {item["path"] for source in sources for wanted in source.values() for item in wanted["items"]}


def known_to(settings: type[ServiceSettings]) -> set[str]:
    return {f"FINERY_{name.upper()}" for name in settings.model_fields}


@pytest.mark.parametrize("case", CASES)
def test_every_variable_is_one_that_the_process_reads(case, render):
    for where, component, entries in environments(render(CASES[case])):
        unknown = {name for name in entries if name.startswith("FINERY_")} - known_to(SETTINGS[component])
        assert unknown == set(), where


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_one_that_the_settings_take(case, render, monkeypatch):
    for _, component, entries in environments(render(CASES[case])):
        with monkeypatch.context() as patch:
            for name, entry in entries.items():
                patch.setenv(name, entry.get("value", "x").replace("$(LWS_WORKER_INDEX)", "1"))
            settings = SETTINGS[component]()
        assert settings.metrics_port == 9100
        assert str(settings.state_dir) == "/var/lib/finery"


@pytest.mark.parametrize("case", [case for case in CASES if case != "no pools"])
def test_a_pool_has_all_that_its_tls_port_needs(case, render, monkeypatch, tmp_path):
    manifests = render(CASES[case])
    templates = dict(manifests.pods)
    pools = [(where, entries) for where, component, entries in environments(manifests) if component == "serving"]
    assert pools
    for number, (where, entries) in enumerate(pools):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in mounted_below("/etc/finery", templates[where]):
            (folder / file).touch()
        with monkeypatch.context() as patch:
            for name, entry in entries.items():
                patch.setenv(name, entry.get("value", "x").replace("/etc/finery", str(folder)))
            endpoint = ServingSettings().tls()
        assert endpoint is not None, where
        assert (endpoint.cert_file.name, endpoint.key_file.name, endpoint.ca_file.name) == ("vllm-tls.crt", "vllm-tls.key", "vllm-ca.crt")


def test_without_pools_the_trainer_deploys_nowhere_and_the_gateway_starts(render, monkeypatch):
    by_component = {component: entries for _, component, entries in environments(render(CASES["no pools"]))}
    assert "FINERY_SERVING_ADDRESS" not in by_component["trainer"]
    for name, entry in by_component["gateway"].items():
        monkeypatch.setenv(name, entry.get("value", "x"))
    assert targets_of(GatewaySettings()).training == "demo-finery-trainer:9000"


def test_files_that_variables_name_are_mounted(render):
    for where, template in render(CASES["default"]).pods:
        for entry in template["spec"]["containers"][0].get("env", ()):
            folder, _, file = entry.get("value", "").rpartition("/")
            if entry["name"].startswith("FINERY_") and folder == "/etc/finery":
                assert file in mounted_below(folder, template), f"{where}: {entry['name']}"


def test_the_converter_finds_its_tokens_and_the_hub_and_clients_the_store(render, monkeypatch, tmp_path):
    manifests = render(CASES["a Hub and a public store"])
    templates = dict(manifests.pods)
    for where, component, entries in environments(manifests):
        has_hub = {"FINERY_HUB_ENDPOINT", "FINERY_HUB_TOKENS_DIR"} <= entries.keys()
        assert (has_hub, "FINERY_S3_PUBLIC_ENDPOINT" in entries) == (component == "converter", component == "gateway"), where
        if has_hub:
            converter, variables = templates[where], entries
    for file in mounted_below("/etc/finery", converter):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    for name, entry in variables.items():
        monkeypatch.setenv(name, entry.get("value", "x").replace("/etc/finery", str(tmp_path)))
    settings = ConverterSettings()
    assert settings.hub_endpoint == "https://hub.example.org:8443"
    assert settings.hub_token("default", "default") == "hub-tokens/default/default"
    assert settings.hub_token("research", "write") == "hub-tokens/research/write"
    egress = manifests.one("NetworkPolicy", "demo-finery-converter")["spec"]["egress"]
    assert {"ports": [{"port": 8443}], "to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]} in egress


def test_no_pod_has_a_secret_that_it_does_not_need(render):
    secrets = {
        component: {name for name in entries if name in {"FINERY_TOKEN_SECRET_FILE", "FINERY_DATABASE_URL"}}
        for _, component, entries in environments(render(CASES["a group of nodes"]))
    }
    assert secrets["worker"] == secrets["base-weights"] == secrets["serving-follower"] == set()
    assert secrets["trainer"] == {"FINERY_TOKEN_SECRET_FILE", "FINERY_DATABASE_URL"}


def test_secrets_are_references(render):
    for _, _, entries in environments(render(CASES["external"])):
        for name, entry in entries.items():
            if name == "FINERY_DATABASE_URL":
                assert entry["valueFrom"]["secretKeyRef"] == {"name": "finery-postgres", "key": "url"}
            assert name not in {"FINERY_S3_ACCESS_KEY", "FINERY_S3_SECRET_KEY"}


def test_the_catalogue_and_the_sources_are_ones_that_finery_reads(render, tmp_path):
    from finery_common.base_weights import read_sources
    from finery_common.catalogue import Catalogue

    data = render(CASES["external"]).one("ConfigMap", "demo-finery-catalogue")["data"]
    (tmp_path / "catalogue.yaml").write_text(data["catalogue.yaml"])
    (tmp_path / "sources.yaml").write_text(data["sources.yaml"])
    (entry,) = Catalogue.load(tmp_path / "catalogue.yaml").list()
    (source,) = read_sources(tmp_path / "sources.yaml")
    assert (entry.name, str(entry.path), entry.max_sequence_length) == (
        "Llama-3.1-8B-Instruct", "/models/Llama-3.1-8B-Instruct", 131072,
    )  # fmt: skip
    assert (source.name, source.s3_prefix) == (entry.name, "projects/base/models/llama-3.1-8b-instruct/")


def test_the_digest_of_base_weights_reaches_the_job_as_text(render, tmp_path):
    """All digits is a digest as well, and no number."""
    from finery_common.base_weights import read_sources

    (model,) = CASES["weights by their digest"]["baseModels"]["models"]
    manifests = render(CASES["weights by their digest"])
    (tmp_path / "sources.yaml").write_text(manifests.one("ConfigMap", "demo-finery-catalogue")["data"]["sources.yaml"])
    (source,) = read_sources(tmp_path / "sources.yaml")
    assert (source.name, source.hub_id, source.sha256) == (model["name"], model["hubId"], model["sha256"])
    (where,) = (where for where, _ in manifests.pods if where.startswith("Job/demo-finery-base-weights"))
    pod = dict(manifests.pods)[where]["spec"]
    assert pod["containers"][0]["command"][-2:] == ["/etc/finery/sources.yaml", "/models"]
    assert "sources.yaml" in mounted_below("/etc/finery", dict(manifests.pods)[where])


def test_authorities_of_ones_own_reach_every_pod(render):
    manifests = render(CASES["authorities of one's own"])
    for where, _, entries in environments(manifests):
        assert entries["SSL_CERT_FILE"]["value"] == entries["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"]["value"] == "/etc/finery/trusted-ca.crt", (
            where
        )
    for where, template in manifests.pods:
        if template["metadata"]["labels"]["app.kubernetes.io/component"] in SETTINGS:
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            wanted = {"secret": {"name": "company-ca", "items": [{"key": "ca.crt", "path": "trusted-ca.crt"}]}}
            assert wanted in volumes["config"]["projected"]["sources"], where
