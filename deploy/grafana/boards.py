"""What the four dashboards show: rows of panels, each with its PromQL. How they look is `dashboards`'.

A panel shows one thing; its text says how to read it where that is not plain. Where the numbers come from is the services' `metrics.py`,
vLLM, and `deploy/prometheus/rules.yaml`.
"""

from __future__ import annotations

from panels import Board, Choice, Panel, mean, p95, quantiles

_PERCENT, _SECONDS, _BYTES, _PER_SECOND, _COUNT = "percentunit", "s", "bytes", "ops", "short"
_TOKENS_PER_SECOND = "suffix: tokens/s"


def fleet() -> Board:
    """Everything at a glance: what is up, GPUs, jobs, requests, stores."""
    return Board(
        uid="finery-fleet",
        title="Finery: fleet",
        choices=(Choice(name="project", metric="finery_gateway_requests_total", label="project"),),
        rows={"Now": _fleet_now(), "GPUs": _fleet_gpus(), "Gateway": _fleet_gateway(), "Work and storage": _fleet_work()},
    )


def _fleet_now() -> tuple[Panel, ...]:
    return (
        Panel(title="Processes down", unit=_COUNT, queries={"down": 'count(up{job="finery"} == 0) or vector(0)'}, is_number=True),
        Panel(
            title="vLLMs that answer",
            unit=_COUNT,
            queries={"{{base_model}}": "sum by (base_model) (finery_serving_vllm_ready)"},
            is_number=True,
        ),
        Panel(title="Jobs that train", unit=_COUNT, queries={"running": 'sum(finery_trainer_jobs{state="RUNNING"})'}, is_number=True),
        Panel(
            title="Tokens answered per second",
            unit=_TOKENS_PER_SECOND,
            queries={"tokens": 'sum(rate(finery_gateway_tokens_total{kind="completion"}[$__rate_interval]))'},
            is_number=True,
        ),
    )


def _fleet_gpus() -> tuple[Panel, ...]:
    return (
        Panel(
            title="GPU memory in use",
            unit=_PERCENT,
            queries={"{{uuid}}": "finery:gpu_memory_used_ratio"},
            text="By NVML inside the pods, or by DCGM's exporter. Training and vLLM fill a card on purpose.",
        ),
        Panel(title="GPU busy", unit=_PERCENT, queries={"{{uuid}}": "finery:gpu_utilization_ratio"}),
        Panel(title="Power", unit="watt", queries={"{{uuid}}": "max by (uuid) (finery_gpu_power_watts)"}),
        Panel(title="Temperature", unit="celsius", queries={"{{uuid}}": "max by (uuid) (finery_gpu_temperature_celsius)"}),
    )


def _fleet_gateway() -> tuple[Panel, ...]:
    of_project = '{project=~"$project"}'
    return (
        Panel(
            title="Requests by project",
            unit=_PER_SECOND,
            queries={"{{project}}": f"sum by (project) (rate(finery_gateway_requests_total{of_project}[$__rate_interval]))"},
        ),
        Panel(
            title="Errors",
            unit=_PER_SECOND,
            queries={
                "{{project}} {{status}}": 'sum by (project, status) (rate(finery_gateway_requests_total{project=~"$project",'
                'status=~"[45].."}[$__rate_interval]))',
                "refused by limit: {{limit}}": "sum by (limit) (rate(finery_gateway_rate_limited_total[$__rate_interval]))",
            },
        ),
        Panel(
            title="Tokens by project",
            unit=_TOKENS_PER_SECOND,
            queries={"{{project}} {{kind}}": f"sum by (project, kind) (rate(finery_gateway_tokens_total{of_project}[$__rate_interval]))"},
        ),
        Panel(
            title="Answer time by route, 95 %",
            unit=_SECONDS,
            queries={"{{route}}": p95("finery_gateway_request_seconds", "route, ")},
        ),
        Panel(title="Generations being answered", unit=_COUNT, queries={"open": "sum(finery_gateway_open_generations)"}),
        Panel(
            title="Bytes uploaded",
            unit="Bps",
            queries={"{{project}}": f"sum by (project) (rate(finery_gateway_upload_bytes_total{of_project}[$__rate_interval]))"},
        ),
    )


def _fleet_work() -> tuple[Panel, ...]:
    return (
        Panel(
            title="Jobs by state",
            unit=_COUNT,
            queries={
                "training {{state}}": "sum by (state) (finery_trainer_jobs) > 0",
                "dataset {{state}}": "sum by (state) (finery_dataprep_jobs) > 0",
                "conversion {{state}}": "sum by (state) (finery_converter_jobs) > 0",
            },
        ),
        Panel(title="Longest wait for a worker", unit=_SECONDS, queries={"waits": "max(finery_trainer_oldest_queued_seconds)"}),
        Panel(
            title="Time in the queue, 95 %",
            unit=_SECONDS,
            queries={
                "training": p95("finery_trainer_queue_seconds", ""),
                "dataset": p95("finery_dataprep_queue_seconds", ""),
                "conversion": p95("finery_converter_queue_seconds", ""),
            },
        ),
        Panel(
            title="Bytes of artifacts",
            unit="Bps",
            queries={"{{service}} {{direction}}": "sum by (service, direction) (rate(finery_artifact_bytes_total[$__rate_interval]))"},
        ),
        Panel(
            title="Failures of store and database",
            unit=_COUNT,
            queries={
                "{{service}} {{operation}}": "sum by (service, operation) (increase(finery_artifact_failures_total[$__rate_interval]))",
                "{{service}} store gone": "sum by (service) (increase(finery_store_unavailable_total[$__rate_interval]))",
                "{{service}} database": "sum by (service) (increase(finery_database_failures_total[$__rate_interval]))",
            },
        ),
        Panel(
            title="gRPC errors",
            unit=_PER_SECOND,
            queries={
                "{{service}} {{code}}": 'sum by (service, code) (rate(finery_rpc_requests_total{code!="OK"}[$__rate_interval]))',
                "all requests": "sum(rate(finery_rpc_requests_total[$__rate_interval]))",
            },
        ),
    )


def training() -> Board:
    """One job, or several beside each other."""
    return Board(
        uid="finery-training",
        title="Finery: training job",
        choices=(Choice(name="job_id", metric="finery_trainer_step", label="job_id"),),
        rows={"Course": _course(), "Speed": _speed(), "Memory": _training_memory(), "Service": _training_service()},
    )


def _of_job(name: str) -> dict[str, str]:
    return {"{{job_id}}": f'finery_trainer_{name}{{job_id=~"$job_id"}}'}


def _course() -> tuple[Panel, ...]:
    loss = {
        "{{job_id}}": 'finery_trainer_loss{job_id=~"$job_id"}',
        "{{job_id}} validation": 'finery_trainer_validation_loss{job_id=~"$job_id"}',
    }
    done = 'finery_trainer_step{job_id=~"$job_id"} / finery_trainer_steps{job_id=~"$job_id"}'
    return (
        Panel(title="Loss", unit=_COUNT, queries=loss),
        Panel(title="Gradient norm", unit=_COUNT, queries=_of_job("grad_norm"), text="Before clipping."),
        Panel(title="Learning rate", unit="sci", queries=_of_job("learning_rate")),
        Panel(title="Steps done", unit=_PERCENT, queries={"{{job_id}}": done}),
        Panel(
            title="Since the last step",
            unit=_SECONDS,
            queries={"{{job_id}}": 'time() - finery_trainer_last_progress_timestamp_seconds{job_id=~"$job_id"}'},
        ),
    )


def _speed() -> tuple[Panel, ...]:
    return (
        Panel(title="Tokens per second", unit=_TOKENS_PER_SECOND, queries=_of_job("tokens_per_second")),
        Panel(
            title="Model FLOPs utilization",
            unit=_PERCENT,
            queries=_of_job("mfu_ratio"),
            text="What the model's arithmetic needs over what the card could do in 16 bits. Recomputing to save memory counts as time, "
            "not as work. None on a CPU, for a card that is not in the table, a mixture of experts, and pairs.",
        ),
        Panel(
            title="Time of a step",
            unit=_SECONDS,
            queries={
                "{{job_id}}": 'finery_trainer_seconds_per_step{job_id=~"$job_id"}',
                "{{job_id}} reading rows": 'finery_trainer_data_wait_seconds{job_id=~"$job_id"}',
            },
            text="Reports and checkpoints included. A GPU computes beside a part of the reading.",
        ),
    )


def _training_memory() -> tuple[Panel, ...]:
    return (
        Panel(
            title="VRAM after each step",
            unit=_BYTES,
            queries={
                "{{job_id}} peak": 'finery_trainer_memory_bytes{job_id=~"$job_id"}',
                "{{job_id}} allocated": 'finery_trainer_memory_allocated_bytes{job_id=~"$job_id"}',
                "{{job_id}} reserved": 'finery_trainer_memory_reserved_bytes{job_id=~"$job_id"}',
            },
            text="On a CPU the peak is the resident set, and there are no others.",
        ),
        Panel(
            title="VRAM inside the worker",
            unit=_BYTES,
            queries={"{{job_id}} {{gpu}} {{kind}}": 'finery_worker_vram_bytes{job_id=~"$job_id"}'},
            text="Read at each scrape, before the first step too.",
        ),
        Panel(title="GPU memory free", unit=_BYTES, queries={"{{uuid}}": "finery:gpu_memory_free_bytes"}),
    )


def _training_service() -> tuple[Panel, ...]:
    return (
        Panel(
            title="Tokens trained per second, all jobs",
            unit=_TOKENS_PER_SECOND,
            queries={"tokens": "sum(rate(finery_trainer_tokens_total[$__rate_interval]))"},
        ),
        Panel(
            title="Failures",
            unit=_COUNT,
            queries={
                "failed: {{code}}": "sum by (code) (increase(finery_trainer_job_failures_total[$__rate_interval]))",
                "workers lost": "sum(increase(finery_trainer_lost_attempts_total[$__rate_interval]))",
                "deployments {{state}}": "sum by (state) (increase(finery_trainer_deployments_total[$__rate_interval]))",
            },
        ),
        Panel(title="Time of a step, all jobs", unit=_SECONDS, queries=quantiles("finery_trainer_step_seconds")),
    )


def serving() -> Board:
    """vLLM's replicas under load."""
    return Board(
        uid="finery-serving",
        title="Finery: serving",
        choices=(Choice(name="replica", metric="finery_serving_vllm_ready", label="replica"),),
        rows={"Throughput": _throughput(), "Latency": _latency(), "Engine": _engine()},
    )


_REPLICA = '{replica=~"$replica"}'


def _by_replica(metric: str) -> dict[str, str]:
    return {"{{replica}}": f"sum by (replica) (rate({metric}{_REPLICA}[$__rate_interval]))"}


def _throughput() -> tuple[Panel, ...]:
    return (
        Panel(title="Tokens answered per second", unit=_TOKENS_PER_SECOND, queries=_by_replica("vllm:generation_tokens_total")),
        Panel(title="Tokens of prompts per second", unit=_TOKENS_PER_SECOND, queries=_by_replica("vllm:prompt_tokens_total")),
        Panel(
            title="Requests",
            unit=_COUNT,
            queries={
                "{{replica}} running": f"sum by (replica) (vllm:num_requests_running{_REPLICA})",
                "{{replica}} waiting": f"sum by (replica) (vllm:num_requests_waiting{_REPLICA})",
            },
        ),
    )


def _latency() -> tuple[Panel, ...]:
    return (
        Panel(title="First token", unit=_SECONDS, queries=quantiles("vllm:time_to_first_token_seconds", _REPLICA)),
        Panel(title="Between tokens", unit=_SECONDS, queries=quantiles("vllm:inter_token_latency_seconds", _REPLICA)),
        Panel(title="Waiting in vLLM's queue", unit=_SECONDS, queries=quantiles("vllm:request_queue_time_seconds", _REPLICA)),
        Panel(
            title="First byte at the gateway, 95 %",
            unit=_SECONDS,
            queries={"{{route}}": p95("finery_gateway_first_byte_seconds", "route, ")},
            text="With the hop, and with what a version that is cold takes to load.",
        ),
        Panel(
            title="Sent a second time by the gateway",
            unit=_PER_SECOND,
            queries={"{{cause}}": "sum by (cause) (rate(finery_gateway_upstream_retries_total[$__rate_interval]))"},
        ),
    )


def _engine() -> tuple[Panel, ...]:
    return (
        Panel(title="KV cache in use", unit=_PERCENT, queries={"{{replica}}": f"vllm:kv_cache_usage_perc{_REPLICA}"}),
        Panel(title="Preemptions", unit=_PER_SECOND, queries=_by_replica("vllm:num_preemptions_total")),
        Panel(
            title="Prefix cache, hits",
            unit=_PERCENT,
            queries={
                "{{replica}}": f"sum by (replica) (rate(vllm:prefix_cache_hits_total{_REPLICA}[$__rate_interval]))"
                f" / sum by (replica) (rate(vllm:prefix_cache_queries_total{_REPLICA}[$__rate_interval]))"
            },
        ),
        Panel(title="GPU memory in use", unit=_PERCENT, queries={"{{uuid}}": "finery:gpu_memory_used_ratio"}),
        Panel(
            title="vLLM answers, and was started anew",
            unit=_COUNT,
            queries={
                "{{base_model}} {{replica}}": f"finery_serving_vllm_ready{_REPLICA}",
                "starts of {{service}} in an hour": "increase(finery_serving_vllm_starts_total[1h])",
            },
        ),
        Panel(title="Time to start", unit=_SECONDS, queries={"mean": mean("finery_serving_vllm_start_seconds", "service")}),
    )


def adapters() -> Board:
    """Versions: where they are, how they swap, what they answer."""
    return Board(
        uid="finery-adapters",
        title="Finery: adapters",
        choices=(
            Choice(name="replica", metric="finery_serving_vllm_ready", label="replica"),
            Choice(name="alias", metric="finery_gateway_version_requests_total", label="alias"),
        ),
        rows={"Where they are": _residency(), "Swaps": _swaps(), "What they answer": _answers()},
    )


def _residency() -> tuple[Panel, ...]:
    states = 'count by (replica) (finery_serving_adapter_state{{replica=~"$replica"}} == {number})'
    names = ("cold", "loaded", "draining", "failed")
    return (
        Panel(
            title="Versions by state",
            unit=_COUNT,
            queries={f"{{{{replica}}}} {name}": states.format(number=number) for number, name in enumerate(names)},
        ),
        Panel(
            title="State of each version",
            unit=_COUNT,
            queries={
                "{{adapter}} {{replica}}": 'max by (adapter, replica) (finery_serving_adapter_state{replica=~"$replica",adapter!=""})'
            },
            text="0 cold: loaded when asked for. 1 loaded. 2 draining. 3 failed.",
        ),
        Panel(
            title="Requests in flight",
            unit=_COUNT,
            queries={"{{version}}": f"sum by (version) (finery_serving_requests_in_flight{_REPLICA})"},
        ),
    )


def _swaps() -> tuple[Panel, ...]:
    return (
        Panel(
            title="Rollouts, promotions, roll backs",
            unit=_COUNT,
            queries={"{{outcome}}": "sum by (outcome) (increase(finery_serving_swaps_total[$__rate_interval]))"},
        ),
        Panel(title="From staged to flipped", unit=_SECONDS, queries=quantiles("finery_serving_swap_seconds")),
        Panel(title="Loading into vLLM", unit=_SECONDS, queries=quantiles("finery_serving_adapter_load_seconds")),
        Panel(title="Fetching and verifying", unit=_SECONDS, queries=quantiles("finery_serving_adapter_stage_seconds")),
        Panel(
            title="Evictions",
            unit=_COUNT,
            queries={"{{replica}}": f"sum by (replica) (increase(finery_serving_evictions_total{_REPLICA}[$__rate_interval]))"},
            text="Many of them mean more names in use than fit: raise FINERY_MAX_CPU_LORAS, or add a replica.",
        ),
    )


def _answers() -> tuple[Panel, ...]:
    alias = '{alias=~"$alias"}'
    by, requests = "sum by (alias, version", "finery_gateway_version_requests_total"
    return (
        Panel(
            title="Requests by version",
            unit=_PER_SECOND,
            queries={"{{alias}} {{version}} {{outcome}}": f"{by}, outcome) (rate({requests}{alias}[$__rate_interval]))"},
        ),
        Panel(
            title="Tokens by version",
            unit=_TOKENS_PER_SECOND,
            queries={"{{alias}} {{version}} {{kind}}": f"{by}, kind) (rate(finery_gateway_version_tokens_total{alias}[$__rate_interval]))"},
        ),
        Panel(
            title="First byte by version, 95 %",
            unit=_SECONDS,
            queries={"{{alias}} {{version}}": p95("finery_gateway_version_first_byte_seconds", "alias, version, ", alias)},
        ),
        Panel(
            title="Answer time by version, 95 %",
            unit=_SECONDS,
            queries={"{{alias}} {{version}}": p95("finery_gateway_version_request_seconds", "alias, version, ", alias)},
        ),
    )
