import datetime

from finery.common.v1 import job_pb2 as _job_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RolloutState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLOUT_STATE_UNSPECIFIED: _ClassVar[RolloutState]
    ROLLOUT_STATE_PENDING: _ClassVar[RolloutState]
    ROLLOUT_STATE_STAGING: _ClassVar[RolloutState]
    ROLLOUT_STATE_LOADING: _ClassVar[RolloutState]
    ROLLOUT_STATE_PROBING: _ClassVar[RolloutState]
    ROLLOUT_STATE_DRAINING: _ClassVar[RolloutState]
    ROLLOUT_STATE_READY: _ClassVar[RolloutState]
    ROLLOUT_STATE_FAILED: _ClassVar[RolloutState]
    ROLLOUT_STATE_CANARY: _ClassVar[RolloutState]
    ROLLOUT_STATE_ROLLED_BACK: _ClassVar[RolloutState]
ROLLOUT_STATE_UNSPECIFIED: RolloutState
ROLLOUT_STATE_PENDING: RolloutState
ROLLOUT_STATE_STAGING: RolloutState
ROLLOUT_STATE_LOADING: RolloutState
ROLLOUT_STATE_PROBING: RolloutState
ROLLOUT_STATE_DRAINING: RolloutState
ROLLOUT_STATE_READY: RolloutState
ROLLOUT_STATE_FAILED: RolloutState
ROLLOUT_STATE_CANARY: RolloutState
ROLLOUT_STATE_ROLLED_BACK: RolloutState

class Replica(_message.Message):
    __slots__ = ("id", "ready", "start_time", "loaded_versions")
    ID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    LOADED_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    ready: bool
    start_time: _timestamp_pb2.Timestamp
    loaded_versions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., ready: _Optional[bool] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., loaded_versions: _Optional[_Iterable[str]] = ...) -> None: ...

class Deployment(_message.Message):
    __slots__ = ("base_model", "base_model_sha256", "replicas", "max_lora_rank", "max_model_len")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    base_model_sha256: str
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    max_lora_rank: int
    max_model_len: int
    def __init__(self, base_model: _Optional[str] = ..., base_model_sha256: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., max_lora_rank: _Optional[int] = ..., max_model_len: _Optional[int] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("state", "version", "error", "swap_seconds", "canary_weight")
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SWAP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CANARY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    state: RolloutState
    version: str
    error: _job_pb2.JobError
    swap_seconds: float
    canary_weight: int
    def __init__(self, state: _Optional[_Union[RolloutState, str]] = ..., version: _Optional[str] = ..., error: _Optional[_Union[_job_pb2.JobError, _Mapping]] = ..., swap_seconds: _Optional[float] = ..., canary_weight: _Optional[int] = ...) -> None: ...

class Canary(_message.Message):
    __slots__ = ("version", "adapter", "job_id", "weight")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    version: str
    adapter: _job_pb2.ArtifactRef
    job_id: str
    weight: int
    def __init__(self, version: _Optional[str] = ..., adapter: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., job_id: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class PreviousVersion(_message.Message):
    __slots__ = ("version", "adapter", "job_id")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    version: str
    adapter: _job_pb2.ArtifactRef
    job_id: str
    def __init__(self, version: _Optional[str] = ..., adapter: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., job_id: _Optional[str] = ...) -> None: ...

class Alias(_message.Message):
    __slots__ = ("name", "alias", "base_model", "version", "adapter", "etag", "epoch", "rollout", "job_id", "create_time", "update_time", "canary", "previous", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    base_model: str
    version: str
    adapter: _job_pb2.ArtifactRef
    etag: str
    epoch: int
    rollout: Rollout
    job_id: str
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    canary: Canary
    previous: PreviousVersion
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., base_model: _Optional[str] = ..., version: _Optional[str] = ..., adapter: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., etag: _Optional[str] = ..., epoch: _Optional[int] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ..., job_id: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., canary: _Optional[_Union[Canary, _Mapping]] = ..., previous: _Optional[_Union[PreviousVersion, _Mapping]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class ListDeploymentsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDeploymentsResponse(_message.Message):
    __slots__ = ("deployments",)
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    deployments: _containers.RepeatedCompositeFieldContainer[Deployment]
    def __init__(self, deployments: _Optional[_Iterable[_Union[Deployment, _Mapping]]] = ...) -> None: ...

class DeployAdapterRequest(_message.Message):
    __slots__ = ("parent", "alias", "adapter", "etag", "request_id", "canary_weight")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CANARY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    parent: str
    alias: str
    adapter: _job_pb2.ArtifactRef
    etag: str
    request_id: str
    canary_weight: int
    def __init__(self, parent: _Optional[str] = ..., alias: _Optional[str] = ..., adapter: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., etag: _Optional[str] = ..., request_id: _Optional[str] = ..., canary_weight: _Optional[int] = ...) -> None: ...

class GetAliasRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListAliasesRequest(_message.Message):
    __slots__ = ("parent", "page_size", "page_token")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    parent: str
    page_size: int
    page_token: str
    def __init__(self, parent: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAliasesResponse(_message.Message):
    __slots__ = ("aliases", "next_page_token")
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    next_page_token: str
    def __init__(self, aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteAliasRequest(_message.Message):
    __slots__ = ("name", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class SetCanaryWeightRequest(_message.Message):
    __slots__ = ("name", "weight", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: int
    etag: str
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[int] = ..., etag: _Optional[str] = ...) -> None: ...

class PromoteAliasRequest(_message.Message):
    __slots__ = ("name", "etag", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    request_id: str
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class RollBackAliasRequest(_message.Message):
    __slots__ = ("name", "etag", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    request_id: str
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class PinAliasRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnpinAliasRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WatchAliasesRequest(_message.Message):
    __slots__ = ("parent",)
    PARENT_FIELD_NUMBER: _ClassVar[int]
    parent: str
    def __init__(self, parent: _Optional[str] = ...) -> None: ...

class AliasEvent(_message.Message):
    __slots__ = ("alias", "deleted")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    alias: Alias
    deleted: bool
    def __init__(self, alias: _Optional[_Union[Alias, _Mapping]] = ..., deleted: _Optional[bool] = ...) -> None: ...

class ResolveModelRequest(_message.Message):
    __slots__ = ("parent", "model", "after_epoch")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AFTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    parent: str
    model: str
    after_epoch: int
    def __init__(self, parent: _Optional[str] = ..., model: _Optional[str] = ..., after_epoch: _Optional[int] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("version", "epoch", "base_model", "max_model_len", "targets")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    version: str
    epoch: int
    base_model: str
    max_model_len: int
    targets: _containers.RepeatedCompositeFieldContainer[RouteTarget]
    def __init__(self, version: _Optional[str] = ..., epoch: _Optional[int] = ..., base_model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[RouteTarget, _Mapping]]] = ...) -> None: ...

class RouteTarget(_message.Message):
    __slots__ = ("version", "weight", "replicas")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    version: str
    weight: int
    replicas: _containers.RepeatedCompositeFieldContainer[RouteReplica]
    def __init__(self, version: _Optional[str] = ..., weight: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[RouteReplica, _Mapping]]] = ...) -> None: ...

class RouteReplica(_message.Message):
    __slots__ = ("address", "token")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    address: str
    token: str
    def __init__(self, address: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...
