"""A Prometheus of the tests' own: scrapes a running system every second, evaluates the committed rules, and is asked by HTTP."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from observability.expressions import RULES

from finery_cli.local.ports import free_ports

READY_S = 30.0


@dataclass
class Prometheus:
    """Asked about everything since it was started."""

    url: str
    started_s: float = field(default_factory=time.time)

    def ask(self, path: str, **parameters: object) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def metric_names(self) -> set[str]:
        return set(self.ask("label/__name__/values", start=self.started_s, end=time.time()))

    def labels_of(self, metric: str) -> set[str]:
        """Of any series that the metric has had."""
        found = self.ask("series", **{"match[]": f'{{__name__="{metric}"}}', "start": self.started_s, "end": time.time()})
        return {label for series in found for label in series}

    def results(self, expr: str) -> list[dict[str, str]]:
        """The labels of the series that `expr` has had at any time."""
        data = self.ask("query_range", query=expr, start=self.started_s, end=time.time(), step="1s")
        return [series["metric"] for series in data["result"]]


@contextlib.contextmanager
def running_prometheus(folder: Path, targets_dir: Path) -> Iterator[Prometheus]:
    """Scrapes what the files of `targets_dir` name, as `deploy/prometheus/prometheus.yml` does but for its pace."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("prometheus is missing; install it: apt-get install prometheus", pytrace=False)
    scraped = {"job_name": "finery", "file_sd_configs": [{"files": [f"{targets_dir}/*.json"], "refresh_interval": "1s"}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [scraped],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
    try:
        _wait_ready(f"http://{address}", process, folder / "log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, f"Prometheus is not ready after {READY_S} s: {log.read_text()}"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
