import datetime

from finery.common.v1 import job_pb2 as _job_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OutputFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_FORMAT_UNSPECIFIED: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_SAFETENSORS: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_GGUF: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_ADAPTER: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_GGUF_ADAPTER: _ClassVar[OutputFormat]

class OutputType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_TYPE_UNSPECIFIED: _ClassVar[OutputType]
    OUTPUT_TYPE_BF16: _ClassVar[OutputType]
    OUTPUT_TYPE_F16: _ClassVar[OutputType]
    OUTPUT_TYPE_Q8_0: _ClassVar[OutputType]
    OUTPUT_TYPE_F32: _ClassVar[OutputType]
    OUTPUT_TYPE_NF4: _ClassVar[OutputType]
    OUTPUT_TYPE_FP8: _ClassVar[OutputType]
    OUTPUT_TYPE_FP8_BLOCK: _ClassVar[OutputType]
    OUTPUT_TYPE_Q6_K: _ClassVar[OutputType]
    OUTPUT_TYPE_Q5_K_M: _ClassVar[OutputType]
    OUTPUT_TYPE_Q5_K_S: _ClassVar[OutputType]
    OUTPUT_TYPE_Q4_K_M: _ClassVar[OutputType]
    OUTPUT_TYPE_Q4_K_S: _ClassVar[OutputType]
    OUTPUT_TYPE_Q4_0: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ4_NL: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ4_XS: _ClassVar[OutputType]
    OUTPUT_TYPE_Q3_K_L: _ClassVar[OutputType]
    OUTPUT_TYPE_Q3_K_M: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ3_M: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ3_S: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ3_XXS: _ClassVar[OutputType]
    OUTPUT_TYPE_Q2_K: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ2_M: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ2_S: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ2_XS: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ2_XXS: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ1_M: _ClassVar[OutputType]
    OUTPUT_TYPE_IQ1_S: _ClassVar[OutputType]

class Combination(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINATION_UNSPECIFIED: _ClassVar[Combination]
    COMBINATION_LINEAR: _ClassVar[Combination]
    COMBINATION_TIES: _ClassVar[Combination]
    COMBINATION_DARE_LINEAR: _ClassVar[Combination]
    COMBINATION_DARE_TIES: _ClassVar[Combination]
    COMBINATION_CAT: _ClassVar[Combination]

class BaseWeights(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASE_WEIGHTS_UNSPECIFIED: _ClassVar[BaseWeights]
    BASE_WEIGHTS_TRAINED: _ClassVar[BaseWeights]
    BASE_WEIGHTS_ORIGINAL: _ClassVar[BaseWeights]
OUTPUT_FORMAT_UNSPECIFIED: OutputFormat
OUTPUT_FORMAT_SAFETENSORS: OutputFormat
OUTPUT_FORMAT_GGUF: OutputFormat
OUTPUT_FORMAT_ADAPTER: OutputFormat
OUTPUT_FORMAT_GGUF_ADAPTER: OutputFormat
OUTPUT_TYPE_UNSPECIFIED: OutputType
OUTPUT_TYPE_BF16: OutputType
OUTPUT_TYPE_F16: OutputType
OUTPUT_TYPE_Q8_0: OutputType
OUTPUT_TYPE_F32: OutputType
OUTPUT_TYPE_NF4: OutputType
OUTPUT_TYPE_FP8: OutputType
OUTPUT_TYPE_FP8_BLOCK: OutputType
OUTPUT_TYPE_Q6_K: OutputType
OUTPUT_TYPE_Q5_K_M: OutputType
OUTPUT_TYPE_Q5_K_S: OutputType
OUTPUT_TYPE_Q4_K_M: OutputType
OUTPUT_TYPE_Q4_K_S: OutputType
OUTPUT_TYPE_Q4_0: OutputType
OUTPUT_TYPE_IQ4_NL: OutputType
OUTPUT_TYPE_IQ4_XS: OutputType
OUTPUT_TYPE_Q3_K_L: OutputType
OUTPUT_TYPE_Q3_K_M: OutputType
OUTPUT_TYPE_IQ3_M: OutputType
OUTPUT_TYPE_IQ3_S: OutputType
OUTPUT_TYPE_IQ3_XXS: OutputType
OUTPUT_TYPE_Q2_K: OutputType
OUTPUT_TYPE_IQ2_M: OutputType
OUTPUT_TYPE_IQ2_S: OutputType
OUTPUT_TYPE_IQ2_XS: OutputType
OUTPUT_TYPE_IQ2_XXS: OutputType
OUTPUT_TYPE_IQ1_M: OutputType
OUTPUT_TYPE_IQ1_S: OutputType
COMBINATION_UNSPECIFIED: Combination
COMBINATION_LINEAR: Combination
COMBINATION_TIES: Combination
COMBINATION_DARE_LINEAR: Combination
COMBINATION_DARE_TIES: Combination
COMBINATION_CAT: Combination
BASE_WEIGHTS_UNSPECIFIED: BaseWeights
BASE_WEIGHTS_TRAINED: BaseWeights
BASE_WEIGHTS_ORIGINAL: BaseWeights

class WeightedAdapter(_message.Message):
    __slots__ = ("adapter", "weight")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    weight: float
    def __init__(self, adapter: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class HubSpec(_message.Message):
    __slots__ = ("repository", "token", "private", "revision")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    repository: str
    token: str
    private: bool
    revision: str
    def __init__(self, repository: _Optional[str] = ..., token: _Optional[str] = ..., private: _Optional[bool] = ..., revision: _Optional[str] = ...) -> None: ...

class ConversionSpec(_message.Message):
    __slots__ = ("adapter", "format", "type", "model", "adapters", "combination", "density", "scale", "base_weights", "calibration_dataset", "importance_matrix", "max_file_size_bytes", "hub")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    COMBINATION_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    BASE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_DATASET_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_MATRIX_FIELD_NUMBER: _ClassVar[int]
    MAX_FILE_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    format: OutputFormat
    type: OutputType
    model: str
    adapters: _containers.RepeatedCompositeFieldContainer[WeightedAdapter]
    combination: Combination
    density: float
    scale: float
    base_weights: BaseWeights
    calibration_dataset: str
    importance_matrix: bool
    max_file_size_bytes: int
    hub: HubSpec
    def __init__(self, adapter: _Optional[str] = ..., format: _Optional[_Union[OutputFormat, str]] = ..., type: _Optional[_Union[OutputType, str]] = ..., model: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[WeightedAdapter, _Mapping]]] = ..., combination: _Optional[_Union[Combination, str]] = ..., density: _Optional[float] = ..., scale: _Optional[float] = ..., base_weights: _Optional[_Union[BaseWeights, str]] = ..., calibration_dataset: _Optional[str] = ..., importance_matrix: _Optional[bool] = ..., max_file_size_bytes: _Optional[int] = ..., hub: _Optional[_Union[HubSpec, _Mapping]] = ...) -> None: ...

class Conversion(_message.Message):
    __slots__ = ("name", "spec", "state", "error", "artifact", "progress", "create_time", "finish_time", "report", "hub", "step")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    FINISH_TIME_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec: ConversionSpec
    state: _job_pb2.JobState
    error: _job_pb2.JobError
    artifact: _job_pb2.ArtifactRef
    progress: float
    create_time: _timestamp_pb2.Timestamp
    finish_time: _timestamp_pb2.Timestamp
    report: _struct_pb2.Struct
    hub: HubPush
    step: str
    def __init__(self, name: _Optional[str] = ..., spec: _Optional[_Union[ConversionSpec, _Mapping]] = ..., state: _Optional[_Union[_job_pb2.JobState, str]] = ..., error: _Optional[_Union[_job_pb2.JobError, _Mapping]] = ..., artifact: _Optional[_Union[_job_pb2.ArtifactRef, _Mapping]] = ..., progress: _Optional[float] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finish_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., report: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., hub: _Optional[_Union[HubPush, _Mapping]] = ..., step: _Optional[str] = ...) -> None: ...

class HubPush(_message.Message):
    __slots__ = ("commit_url", "error")
    COMMIT_URL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    commit_url: str
    error: _job_pb2.JobError
    def __init__(self, commit_url: _Optional[str] = ..., error: _Optional[_Union[_job_pb2.JobError, _Mapping]] = ...) -> None: ...

class CreateConversionRequest(_message.Message):
    __slots__ = ("parent", "spec", "request_id")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    parent: str
    spec: ConversionSpec
    request_id: str
    def __init__(self, parent: _Optional[str] = ..., spec: _Optional[_Union[ConversionSpec, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class GetConversionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListConversionsRequest(_message.Message):
    __slots__ = ("parent", "page_size", "page_token")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    parent: str
    page_size: int
    page_token: str
    def __init__(self, parent: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListConversionsResponse(_message.Message):
    __slots__ = ("conversions", "next_page_token")
    CONVERSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    conversions: _containers.RepeatedCompositeFieldContainer[Conversion]
    next_page_token: str
    def __init__(self, conversions: _Optional[_Iterable[_Union[Conversion, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelConversionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteConversionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WatchConversionRequest(_message.Message):
    __slots__ = ("name", "after_sequence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    after_sequence: int
    def __init__(self, name: _Optional[str] = ..., after_sequence: _Optional[int] = ...) -> None: ...
