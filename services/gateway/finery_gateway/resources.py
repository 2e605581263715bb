"""What the inner services own, as the gateway shows it: typed, frozen, and the response bodies of the native REST API.

Field names are those of the protos; words of enums are in lower case.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, computed_field

from finery_common.conversion_spec import ConversionSpec
from finery_common.spec import DatasetSpec, TrainingSpec
from finery_gateway.proto_data import plain

T = TypeVar("T")
FINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})


class Resource(BaseModel):
    """Base of all resources."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    @classmethod
    def from_proto(cls, message: Message) -> Self:
        """The resource that `message` holds; unset fields take defaults."""
        return cls.model_validate(plain(message))


class Named(Resource):
    """A resource of a project."""

    name: str
    """`projects/{project}/{collection}/{id}`"""

    @computed_field
    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    data: tuple[T, ...]
    next_page_token: str
    """Empty on the last page."""


class FieldViolation(Resource):
    field: str = ""
    description: str = ""
    line: int | None = None
    """Counted from 1."""


class JobError(Resource):
    code: str = "internal_error"
    message: str = ""
    param: str | None = None
    violations: tuple[FieldViolation, ...] = ()


class Artifact(Resource):
    prefix: str
    manifest_sha256: str = ""
    kind: str = ""
    size_bytes: int = 0


class JobEvent(Resource):
    sequence: int
    create_time: datetime
    level: str = "info"
    type: str = "message"
    message: str = ""
    state: str = ""
    data: dict[str, Any] = Field(default_factory=dict[str, Any])


class StepMetrics(Resource):
    step: int = 0
    num_steps: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    tokens_per_second: float = 0.0
    num_trained_tokens: int = 0
    memory_bytes: int = 0
    validation_loss: float | None = None
    data_wait_seconds: float | None = None
    mfu: float | None = None
    memory_allocated_bytes: int | None = None
    memory_reserved_bytes: int | None = None


class JobDeployment(Resource):
    state: str = "none"
    alias: str = ""
    message: str = ""


class Job(Named):
    training_file: str
    validation_file: str | None = None
    spec: TrainingSpec
    suffix: str = ""
    metadata: dict[str, str] = Field(default_factory=dict[str, str])
    deploy: bool = True
    state: str
    error: JobError | None = None
    metrics: StepMetrics | None = None
    adapter: Artifact | None = None
    model: Artifact | None = None
    """What method full has trained, instead of an adapter."""
    metrics_file: Artifact | None = None
    deployment: JobDeployment = JobDeployment()
    create_time: datetime
    start_time: datetime | None = None
    finish_time: datetime | None = None
    estimated_finish_time: datetime | None = None
    training_dataset: str = ""
    validation_dataset: str = ""


class Checkpoint(Named):
    step: int = 0
    metrics: StepMetrics = StepMetrics()
    adapter: Artifact
    alias: str
    create_time: datetime


class BaseModelEntry(Resource):
    name: str
    sha256: str = ""
    max_sequence_length: int = 0


class DatasetStatistics(Resource):
    num_rows: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    min_row_tokens: int = 0
    median_row_tokens: int = 0
    max_row_tokens: int = 0


class GpuMemory(Resource):
    """Bytes of a GPU's memory, by what they hold."""

    weights_bytes: int = 0
    adapters_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_states_bytes: int = 0
    activations_bytes: int = 0
    workspace_bytes: int = 0
    total_bytes: int = 0


class VisibleGpu(Resource):
    index: int = 0
    name: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    fits: bool = False
    """The run fits into what is free."""


class ResourceEstimate(Resource):
    """What a run needs."""

    gpu_memory: GpuMemory
    """Of each of the spec's GPUs."""
    host_bytes: int = 0
    """Pinned host memory."""
    gpus: tuple[VisibleGpu, ...] = ()
    """The GPUs of the machine that trains."""
    fits: bool | None = None
    """Whether the run fits into `device_memory_bytes`; none where that was not given."""


class Dataset(Named):
    spec: DatasetSpec
    state: str
    error: JobError | None = None
    statistics: DatasetStatistics | None = None
    artifact: Artifact | None = None
    create_time: datetime
    finish_time: datetime | None = None


class HubPush(Resource):
    commit_url: str = ""
    """Empty until the push is done."""
    error: JobError | None = None


class Conversion(Named):
    spec: ConversionSpec
    state: str
    error: JobError | None = None
    artifact: Artifact | None = None
    progress: float = 0.0
    step: str = ""
    """What is being done, or was when it ended."""
    create_time: datetime
    finish_time: datetime | None = None
    report: dict[str, Any] | None = None
    """What was measured before publication: parity, perplexities, tensors of another type than asked."""
    hub: HubPush | None = None
    """Of a spec that asks for a push."""


class Rollout(Resource):
    state: str = ""
    version: str = ""
    error: JobError | None = None
    swap_seconds: float = 0.0
    canary_weight: int = 0
    """The share that was asked for in percent; 0 for the whole alias."""


class Canary(Resource):
    version: str
    adapter: Artifact | None = None
    job_id: str = ""
    weight: int
    """Percent of the alias' requests."""


class PreviousVersion(Resource):
    version: str
    adapter: Artifact | None = None
    job_id: str = ""


class Alias(Named):
    alias: str
    base_model: str = ""
    version: str = ""
    """Empty before the first flip."""
    adapter: Artifact | None = None
    etag: str = ""
    epoch: int = 0
    rollout: Rollout = Rollout()
    job_id: str = ""
    canary: Canary | None = None
    """Answers its share of the requests beside `version`."""
    previous: PreviousVersion | None = None
    """What served before, to which a roll back leads."""
    pinned: bool = False
    """`version` is kept loaded."""
    create_time: datetime | None = None
    update_time: datetime | None = None


class AliasEvent(Resource):
    alias: Alias
    deleted: bool = False


class Replica(Resource):
    id: str
    ready: bool = False
    start_time: datetime | None = None
    loaded_versions: tuple[str, ...] = ()


class ServedBase(Resource):
    """A base model being served."""

    base_model: str
    base_model_sha256: str = ""
    replicas: tuple[Replica, ...] = ()
    max_lora_rank: int = 0
    max_model_len: int = 0


class RouteReplica(Resource):
    address: str
    token: str = Field("", repr=False)


class RouteTarget(Resource):
    version: str
    weight: int
    """Percent."""
    replicas: tuple[RouteReplica, ...] = ()
    """Those that answer requests for the version."""


class Route(Resource):
    """Where requests for one model go. Never leaves the gateway: it holds the replicas' tokens."""

    targets: tuple[RouteTarget, ...]
    """The versions that requests are split over, the serving one first."""
    epoch: int = 0
    base_model: str = ""
    max_model_len: int = 0
