"""What an upgrade finds in the cluster stays as it is; and what a packaged chart brings along."""

from __future__ import annotations

import base64
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import helm_python
import pytest
import yaml
from chart_rendering import CASES, CHART_DIR, VALUES_FILES, Manifests, manifests_of, values_with

SNAPSHOTS = ("default", "external")
DEPLOY_DIR = Path(__file__).parents[2] / "deploy"
SNAPSHOT_DIR = Path(__file__).parent / "snapshots"
MODEL = {"name": "m", "maxSequenceLength": 64, "hubId": "o/m"}
NEXT_VALUES: list[dict[str, Any]] = [
    {"log.level": "DEBUG"},
    {"monitoring.otlpEndpoint": "http://collector:4317"},
    {"objectStore.bucket": "other"},
    {"objectStore.region": "eu-central-1"},
    {"objectStore.minio.existingSecret": "own-minio"},
    {"image.tag": "2.0.0"},
    {"image.pullPolicy": "Always"},
    {"image.pullSecrets": ["registry"]},
    {"dataprep.image.digest": f"sha256:{'b' * 64}"},
    {"baseModels.models": [MODEL]},
    {"baseModels.models": [MODEL | {"sha256": "c" * 64}]},
    {"baseModels.cache.existingClaim": "other"},
    {"baseModels.cache": {"kind": "hostPath", "hostPath": "/srv/models"}},
    {"baseModels.hubTokenSecret.name": "hub"},
    {"baseModels.job.resources": {"limits": {"memory": "8Gi"}}},
    {"baseModels.job.nodeSelector": {"disk": "fast"}},
    {"baseModels.job.tolerations": [{"operator": "Exists"}]},
    {"baseModels.job.extraEnv": [{"name": "A", "value": "b"}]},
]
"""What an upgrade may change of the Job that fetches base weights."""


class _ApiServer(ThreadingHTTPServer):
    """As much of an API server as Helm's `lookup` asks of one: which kinds there are, and Secrets by name."""

    def __init__(self, secrets: dict[str, dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.secrets = secrets


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kinds = [{"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret", "verbs": ["get", "list"]}]
        known = {
            "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": kinds},
        } | {f"/api/v1/namespaces/ml/secrets/{name}": secret for name, secret in cast("_ApiServer", self.server).secrets.items()}
        content = known.get(self.path.partition("?")[0])
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(status if content is None else content).encode()
        self.send_response(404 if content is None else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Says nothing."""


@pytest.fixture
def cluster() -> Iterator[_ApiServer]:
    server = _ApiServer({})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def rendered_in(cluster: _ApiServer, chart: helm_python.Chart) -> dict[str, dict[str, Any]]:
    """The Secrets that a release makes in that cluster, by name."""
    address = f"http://127.0.0.1:{cluster.server_address[1]}"
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "ml"}}],
        "current-context": "x",
    }
    with helm_python.Config(kubeconfig_content=yaml.safe_dump(kubeconfig), namespace="ml") as config:
        files = config.render(chart, {}, name="demo", namespace="ml", is_upgrade=True)
    documents = [item for path, text in files.items() if not path.endswith("NOTES.txt") for item in yaml.safe_load_all(text) if item]
    return {item["metadata"]["name"]: item for item in documents if item["kind"] == "Secret"}


def test_an_upgrade_keeps_every_secret(cluster, chart):
    installed = rendered_in(cluster, chart)
    assert set(installed) == {f"demo-finery-{name}" for name in ("token", "minio", "postgres", "vllm-tls")}
    other = rendered_in(cluster, chart)
    assert all(other[name]["data"] != secret["data"] for name, secret in installed.items())  # nothing there: all is made anew
    cluster.secrets.update({name: secret | {"apiVersion": "v1"} for name, secret in installed.items()})
    upgraded = rendered_in(cluster, chart)
    assert {name: secret["data"] for name, secret in upgraded.items()} == {name: secret["data"] for name, secret in installed.items()}


def test_secrets_are_long_and_the_url_has_the_password(chart):
    secrets = manifests_of(chart).of("Secret")
    assert len(base64.b64decode(secrets["demo-finery-token"]["data"]["token"])) >= 32
    database = {key: base64.b64decode(value).decode() for key, value in secrets["demo-finery-postgres"]["data"].items()}
    assert database["url"] == f"postgresql://finery:{database['password']}@demo-finery-postgres:5432/finery"


def test_the_gateway_trusts_the_ca_of_vllms_certificate(chart):
    from cryptography import x509

    data = manifests_of(chart).one("Secret", "demo-finery-vllm-tls")["data"]
    ca, certificate = (x509.load_pem_x509_certificate(base64.b64decode(data[name])) for name in ("ca.crt", "tls.crt"))
    certificate.verify_directly_issued_by(ca)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    assert {"finery-vllm", "*.demo-finery-serving-default.ml.svc"} <= set(names)


def test_an_upgrade_changes_no_job_of_the_same_name(render):
    def job_of(values: dict[str, Any]) -> tuple[str, Any]:
        manifests: Manifests = render(values)
        ((name, job),) = manifests.of("Job").items()
        (sources,) = (item["data"]["sources.yaml"] for key, item in manifests.of("ConfigMap").items() if key.endswith("-catalogue"))
        return name, (job["spec"], sources)

    def values_of(changes: dict[str, Any]) -> dict[str, Any]:
        return values_with("default", changes | {"serving.tls.existingSecret": "own-tls"})  # to make a key takes long

    jobs = [job_of(values) for values in (*CASES.values(), *map(values_of, NEXT_VALUES))]
    by_name = dict(jobs)
    for name, content in jobs:
        assert by_name[name] == content
    assert len({name for name, _ in jobs[-len(NEXT_VALUES) :]}) == len(NEXT_VALUES)
    # And what makes no other pod leaves the Job alone.
    assert job_of(values_of({"gateway.replicas": 3})) == job_of({})


def test_another_version_of_the_chart_alone_starts_no_pod_anew(chart, tmp_path):
    copy = tmp_path / "finery"
    shutil.copytree(CHART_DIR, copy, ignore=shutil.ignore_patterns("deploy"))
    meta = yaml.safe_load((copy / "Chart.yaml").read_text())
    (copy / "Chart.yaml").write_text(yaml.safe_dump(meta | {"version": "9.9.9", "appVersion": "9.9.9"}))
    values = values_with("default", {"image.tag": "1.0.0", "serving.tls.existingSecret": "own-tls"})
    with helm_python.Chart.load(copy) as bumped:
        before, after = manifests_of(chart, values), manifests_of(bumped, values)
    assert after.one("Deployment", "demo-finery-gateway")["metadata"]["labels"]["helm.sh/chart"] == "finery-9.9.9"
    hook = "Pod/demo-finery-test"  # made anew by every `helm test`
    assert {**dict(before.pods), hook: None} == {**dict(after.pods), hook: None}
    assert before.worker_job == after.worker_job


def test_what_holds_data_stays_when_the_release_goes(chart):
    manifests = manifests_of(chart)
    kept = {
        (item["kind"], item["metadata"]["name"])
        for item in manifests.documents
        if item["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    secrets = {("Secret", f"demo-finery-{name}") for name in ("token", "minio", "postgres", "vllm-tls")}
    assert kept == {*secrets, ("PersistentVolumeClaim", "demo-finery-models")}


def test_rules_and_dashboards_come_along(tmp_path):
    copy = tmp_path / "finery"
    shutil.copytree(CHART_DIR, copy, ignore=shutil.ignore_patterns("deploy"))
    (copy / "files/deploy/grafana/dashboards").mkdir(parents=True)
    (copy / "files/deploy/prometheus").mkdir()
    dashboard = {"title": "Fleet", "panels": [{"expr": 'sum by (state) (finery_trainer_jobs{state=~"$state"})', "legend": "{{state}}"}]}
    rule = {"alert": "EngineDown", "expr": "finery_serving_vllm_ready == 0", "annotations": {"summary": "{{ $labels.replica }} is down"}}
    (copy / "files/deploy/grafana/dashboards/fleet.json").write_text(json.dumps(dashboard))
    (copy / "files/deploy/prometheus/rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "finery", "rules": [rule]}]}))
    archive = helm_python.package(copy, destination=tmp_path)
    with helm_python.Chart.load(archive) as packaged:
        manifests = manifests_of(packaged, CASES["the operator"])
    config_map = manifests.one("ConfigMap", "demo-finery-dashboard-fleet")
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config_map["data"]["fleet.json"]) == dashboard
    assert manifests.one("PrometheusRule", "demo-finery")["spec"]["groups"] == [{"name": "finery", "rules": [rule]}]


@pytest.fixture(scope="module", params=["folder", "package"])
def shipped(request, chart, tmp_path_factory) -> Iterator[helm_python.Chart]:
    """The chart as it is, with what its link to `deploy` brings, and as it is handed on."""
    if request.param == "folder":
        yield chart
        return
    with helm_python.Chart.load(helm_python.package(CHART_DIR, destination=tmp_path_factory.mktemp("package"))) as packaged:
        yield packaged


def test_every_rule_and_dashboard_of_deploy_is_in_the_chart(shipped):
    manifests = manifests_of(shipped, values_with("default", {"monitoring.mode": "operator", "serving.tls.existingSecret": "own-tls"}))
    groups = yaml.safe_load((DEPLOY_DIR / "prometheus/rules.yaml").read_text())["groups"]
    assert groups
    assert manifests.one("PrometheusRule", "demo-finery")["spec"]["groups"] == groups
    dashboards = {path.name: path.read_text() for path in (DEPLOY_DIR / "grafana").rglob("*.json")}
    assert dashboards
    shown = [item["data"] for name, item in manifests.of("ConfigMap").items() if name.startswith("demo-finery-dashboard-")]
    assert len(shown) == len(dashboards)
    assert {name: text for data in shown for name, text in data.items()} == dashboards


def test_alerts_name_runbooks_where_people_read_them(chart):
    base = "https://git.example.org/finery/blob/main/"
    changes = {"monitoring.mode": "operator", "monitoring.runbookBaseUrl": base, "serving.tls.existingSecret": "own-tls"}
    manifests = manifests_of(chart, values_with("default", changes))
    rules = [rule for group in manifests.one("PrometheusRule", "demo-finery")["spec"]["groups"] for rule in group["rules"]]
    urls = [rule["annotations"]["runbook_url"] for rule in rules if "alert" in rule]
    assert urls
    assert all(url.startswith(f"{base}deploy/prometheus/runbooks.md#") for url in urls)


@pytest.mark.parametrize("is_there", [True, False])
def test_auto_makes_the_operators_kinds_where_the_cluster_has_them(is_there, chart, tmp_path):
    """Rendering knows only Kubernetes' own APIs, so one of those stands for the operator's."""
    copy = tmp_path / "finery"
    shutil.copytree(CHART_DIR, copy)
    names = copy / "templates/_names.tpl"
    monitor = manifests_of(chart, CASES["the operator"]).one("PodMonitor", "demo-finery")
    asked = f'.Capabilities.APIVersions.Has "{monitor["apiVersion"]}"'
    assert asked in names.read_text()
    names.write_text(names.read_text().replace(asked, asked.replace(monitor["apiVersion"], "apps/v1" if is_there else "apps/v0")))
    values = values_with("default", {"monitoring.mode": "auto", "serving.tls.existingSecret": "own-tls"})
    with helm_python.Chart.load(copy) as changed:
        manifests = manifests_of(changed, values)
    assert (bool(manifests.of("PodMonitor")), bool(manifests.of("PrometheusRule"))) == (is_there, is_there)
    annotated = [where for where, template in manifests.pods if "prometheus.io/scrape" in template["metadata"].get("annotations", {})]
    assert bool(annotated) is not is_there


def test_a_package_has_the_chart_and_of_deploy_what_it_shows(tmp_path):
    with tarfile.open(helm_python.package(CHART_DIR, destination=tmp_path)) as archive:
        names = {name.removeprefix("finery/") for name in archive.getnames()}
    assert {"Chart.yaml", "values.yaml", "values.schema.json", "README.md", *(path.name for path in VALUES_FILES.values())} <= names
    shown = ("files/deploy/grafana/dashboards/", "files/deploy/prometheus/rules.yaml")
    assert [name for name in names if name.startswith("files/") and not name.startswith(shown)] == []


def snapshot_of(manifests: Manifests) -> str:
    """All manifests as text, without what is made at random and what `deploy` brings."""
    documents: list[dict[str, Any]] = []
    for item in manifests.documents:
        if item["metadata"]["labels"]["app.kubernetes.io/component"] == "monitoring" and item["kind"] != "PodMonitor":
            continue
        if item["kind"] == "Secret":
            item = item | {"data": dict.fromkeys(item["data"], "made at install")}
        documents.append(item)
    return yaml.safe_dump_all(documents, sort_keys=False, width=140)


@pytest.mark.parametrize("case", SNAPSHOTS)
def test_manifests_are_those_of_the_snapshot(case, render, update_snapshots):
    file, text = SNAPSHOT_DIR / f"{case}.yaml", snapshot_of(render(CASES[case]))
    if update_snapshots:
        SNAPSHOT_DIR.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text, "the chart makes other manifests; where that is meant: make helm-test UPDATE=1, and look at the diff"
