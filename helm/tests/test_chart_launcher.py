"""The chart's worker Job as the trainer's launcher reads it and fills it in."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml
from chart_rendering import CASES

from finery_trainer.launchers import Attempt
from finery_trainer.launchers.job_template import JobTemplate

ATTEMPT = Attempt("ftjob-0123456789abcdef01234567", 2, "the-token", gpus=2)


@pytest.mark.parametrize("case", CASES)
def test_the_launcher_takes_the_template_and_makes_a_job_of_it(case, render, tmp_path):
    manifests = render(CASES[case])
    file = tmp_path / "worker-job.yaml"
    file.write_text(yaml.safe_dump(manifests.worker_job))
    (trainer,) = (item for name, item in manifests.of("Deployment").items() if name.endswith("-trainer"))
    env = {entry["name"]: entry.get("value") for entry in trainer["spec"]["template"]["spec"]["containers"][0]["env"]}
    resource = env["FINERY_KUBERNETES_GPU_RESOURCE"]

    job = JobTemplate.load(file, gpu_resource=resource, trainer_address="trainer:9000").job(ATTEMPT)
    kubernetes_validate.validate(job, "1.37.0", strict=True)
    assert job["metadata"]["name"] == "ftjob-0123456789abcdef01234567-2"
    (worker,) = job["spec"]["template"]["spec"]["containers"]
    assert worker["resources"].get("limits", {}).get(resource) == ("2" if resource else None)
    assert job["spec"].get("suspend", False) is ("kueue.x-k8s.io/queue-name" in job["metadata"]["labels"])
    assert "the-token" not in str(job["spec"]["template"]["spec"])
