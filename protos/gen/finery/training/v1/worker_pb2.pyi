from finery.common.v1 import job_pb2 as _job_pb2
from finery.training.v1 import spec_pb2 as _spec_pb2
from finery.training.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ACTION_UNSPECIFIED: _ClassVar[WorkerAction]
    WORKER_ACTION_CONTINUE: _ClassVar[WorkerAction]
    WORKER_ACTION_PAUSE: _ClassVar[WorkerAction]
    WORKER_ACTION_CANCEL: _ClassVar[WorkerAction]
WORKER_ACTION_UNSPECIFIED: WorkerAction
WORKER_ACTION_CONTINUE: WorkerAction
WORKER_ACTION_PAUSE: WorkerAction
WORKER_ACTION_CANCEL: WorkerAction

class WorkerCommand(_message.Message):
    __slots__ = ("action",)
    ACTION_FIELD_NUMBER: _ClassVar[int]
    action: WorkerAction
    def __init__(self, action: _Optional[_Union[WorkerAction, str]] = ...) -> None: ...

class GetAssignmentRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("project", "job_id", "epoch", "spec", "training_dataset", "validation_dataset", "checkpoint", "traceparent")
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TRAINING_DATASET_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_DATASET_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    project: str
    job_id: str
    epoch: int
    spec: _spec_pb2.TrainingSpec
    training_dataset: _job_pb2.ArtifactRef
    validation_dataset: _job_pb2.ArtifactRef
    checkpoint: _job_pb2.ArtifactRef
    traceparent: str
    def __init__(self, project: _Optional[str] = ..., job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., spec: _Optional[_Union[_spec_pb2.TrainingSpec, _Mapping]] = ..., training_dataset: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., validation_dataset: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., checkpoint: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: str
    def __init__(self, phase: _Optional[str] = ...) -> None: ...

class ReportStepRequest(_message.Message):
    __slots__ = ("metrics",)
    METRICS_FIELD_NUMBER: _ClassVar[int]
    metrics: _training_pb2.StepMetrics
    def __init__(self, metrics: _Optional[_Union[_training_pb2.StepMetrics, _Mapping]] = ...) -> None: ...

class ReportCheckpointRequest(_message.Message):
    __slots__ = ("step", "state", "adapter", "metrics")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    step: int
    state: _job_pb2.ArtifactRef
    adapter: _job_pb2.ArtifactRef
    metrics: _training_pb2.StepMetrics
    def __init__(self, step: _Optional[int] = ..., state: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., adapter: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., metrics: _Optional[_Union[_training_pb2.StepMetrics, _Mapping]] = ...) -> None: ...

class FinishAttemptRequest(_message.Message):
    __slots__ = ("state", "error", "adapter", "metrics_file", "model")
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    METRICS_FILE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    state: _job_pb2.JobState
    error: _job_pb2.JobError
    adapter: _job_pb2.ArtifactRef
    metrics_file: _job_pb2.ArtifactRef
    model: _job_pb2.ArtifactRef
    def __init__(self, state: _Optional[_Union[_job_pb2.JobState, str]] = ..., error: _Optional[_Union[_job_pb2.JobError, _Mapping]] = ..., adapter: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., metrics_file: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., model: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ...) -> None: ...

class FinishAttemptResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
