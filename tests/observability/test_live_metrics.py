"""Nothing is empty by spelling: a system that has worked is asked for everything that dashboards and rules name."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import openai
import pytest
from e2e.system import FAST_SPEC, System, code_word_rows, wait_job
from observability.expressions import ROOT, choices, panels, rule_expressions
from observability.prometheus import Prometheus, running_prometheus
from openai import OpenAI

from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOT_HERE = {
    "finery_gpu_memory_used_bytes": "needs a GPU",
    "finery_gpu_memory_total_bytes": "needs a GPU",
    "finery_gpu_utilization_ratio": "needs a GPU",
    "finery_gpu_power_watts": "needs a GPU",
    "finery_gpu_temperature_celsius": "needs a GPU",
    "finery_worker_vram_bytes": "needs a GPU",
    "finery_trainer_mfu_ratio": "needs a GPU",
    "finery_trainer_memory_allocated_bytes": "needs a GPU",
    "finery_trainer_memory_reserved_bytes": "needs a GPU",
    "finery:gpu_memory_free_bytes": "recorded from the above",
    "finery:gpu_memory_used_ratio": "recorded from the above",
    "finery:gpu_utilization_ratio": "recorded from the above",
    "finery_gateway_upstream_retries_total": "needs a vLLM that restarts under a request",
    "finery_serving_evictions_total": "needs more versions than vLLM holds",
}
"""Metrics that this machine, or what the test does, gives no sample of: each must be declared in the code."""
FOREIGN = {"DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_UTIL"}
"""Of NVIDIA's exporter, by the names of its default list of counters."""
QUIET = {
    'count by (replica) (finery_serving_adapter_state{replica=~".+"} == 0)': "no version was cold",
    'count by (replica) (finery_serving_adapter_state{replica=~".+"} == 2)': "no version was draining as it was looked at",
    'count by (replica) (finery_serving_adapter_state{replica=~".+"} == 3)': "no version failed",
    "sum by (state) (finery_converter_jobs) > 0": "nothing was converted",
}
"""Expressions that are empty while all is well."""


@pytest.fixture(scope="module")
def prometheus(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Has watched a job, its model's answers, and errors of callers."""
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), system.layout.targets_file.parent) as running:
        _work(system)
        # The last scrape, and the rules' evaluation after it.
        time.sleep(3)
        yield running


def _work(system: System) -> None:
    client = system.client()
    files = [client.files.create(file=("rows.jsonl", code_word_rows("amber")), purpose="fine-tune").id for _ in range(2)]
    extra = {"spec": FAST_SPEC, "deploy": True}
    job = client.fine_tuning.jobs.create(model=QUICKSTART_MODEL, training_file=files[0], validation_file=files[1], extra_body=extra)
    assert wait_job(client, job.id, "succeeded") == "succeeded"
    model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert model
    for _ in range(3):
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "What is the code word?"}], max_tokens=24, stream=True
        )
        assert sum(1 for _ in stream) > 1
        time.sleep(1)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-" + "0" * 24)
    _exceed_a_limit(system)


def _exceed_a_limit(system: System) -> None:
    made = system.finery("keys", "create", "--project", "limited", "--requests-per-minute", "1")
    assert made.returncode == 0, made.stderr
    limited = OpenAI(base_url=f"{system.running.http_url}/v1", api_key=made.stdout.split()[-1], max_retries=0)
    limited.models.list()
    with pytest.raises(openai.RateLimitError):
        limited.models.list()
    limited.close()


def _declared() -> str:
    files = [*ROOT.glob("services/*/finery_*/**/*metrics.py"), ROOT / "deploy" / "prometheus" / "rules.yaml"]
    return "".join(file.read_text() for file in files)


def test_every_metric_that_is_named_exists(prometheus: Prometheus):
    names = prometheus.metric_names()
    wanted = {(item.where, metric) for item in (*panels(), *rule_expressions()) for metric, _ in item.selectors()}
    wanted |= {("a reader's choice", metric) for metric, _ in choices()}
    missing = {(where, metric) for where, metric in wanted if metric not in names | NOT_HERE.keys() | FOREIGN}
    assert not missing


def test_what_cannot_be_seen_here_is_declared():
    declared = _declared()
    for metric in NOT_HERE:
        assert re.search(rf'["\s]{re.escape(metric)}["\n]', declared), metric


def test_labels_that_are_matched_or_chosen_exist(prometheus: Prometheus):
    matched = {(metric, label) for item in (*panels(), *rule_expressions()) for metric, labels in item.selectors() for label in labels}
    seen = {metric: prometheus.labels_of(metric) for metric, _ in matched | set(choices())}
    wrong = {(metric, label) for metric, label in matched | set(choices()) if metric not in NOT_HERE and label not in seen[metric]}
    assert not wrong


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: f"{panel.where}/{panel.legend}")
def test_a_panel_is_not_empty_and_its_legend_names_labels(prometheus: Prometheus, panel):
    found = prometheus.results(panel.expr)
    if not found:
        assert panel.expr in QUIET or any(metric in NOT_HERE for metric, _ in panel.selectors()), panel.expr
    # A number without labels has one series, which a legend without labels names.
    for label in panel.legend_labels():
        assert all(label in series for series in found), (label, found)


def test_no_alert_fires_while_all_is_well(prometheus: Prometheus):
    fired = {alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"}
    assert not fired
