from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MethodType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METHOD_TYPE_UNSPECIFIED: _ClassVar[MethodType]
    METHOD_TYPE_LORA: _ClassVar[MethodType]
    METHOD_TYPE_FULL: _ClassVar[MethodType]
    METHOD_TYPE_DPO: _ClassVar[MethodType]

class Quantization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZATION_UNSPECIFIED: _ClassVar[Quantization]
    QUANTIZATION_NONE: _ClassVar[Quantization]
    QUANTIZATION_NF4: _ClassVar[Quantization]
    QUANTIZATION_INT8: _ClassVar[Quantization]

class DpoLossType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DPO_LOSS_TYPE_UNSPECIFIED: _ClassVar[DpoLossType]
    DPO_LOSS_TYPE_SIGMOID: _ClassVar[DpoLossType]
    DPO_LOSS_TYPE_HINGE: _ClassVar[DpoLossType]
    DPO_LOSS_TYPE_IPO: _ClassVar[DpoLossType]
    DPO_LOSS_TYPE_ROBUST: _ClassVar[DpoLossType]

class OptimizerType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMIZER_TYPE_UNSPECIFIED: _ClassVar[OptimizerType]
    OPTIMIZER_TYPE_AUTO: _ClassVar[OptimizerType]
    OPTIMIZER_TYPE_ADAMW: _ClassVar[OptimizerType]
    OPTIMIZER_TYPE_ADAMW_8BIT: _ClassVar[OptimizerType]
    OPTIMIZER_TYPE_ADAMW_BF16: _ClassVar[OptimizerType]

class ScheduleType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEDULE_TYPE_UNSPECIFIED: _ClassVar[ScheduleType]
    SCHEDULE_TYPE_LINEAR: _ClassVar[ScheduleType]
    SCHEDULE_TYPE_COSINE: _ClassVar[ScheduleType]
    SCHEDULE_TYPE_CONSTANT: _ClassVar[ScheduleType]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_AUTO: _ClassVar[Precision]
    PRECISION_FLOAT32: _ClassVar[Precision]
    PRECISION_BFLOAT16: _ClassVar[Precision]
    PRECISION_FLOAT16: _ClassVar[Precision]

class LoraBias(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LORA_BIAS_UNSPECIFIED: _ClassVar[LoraBias]
    LORA_BIAS_NONE: _ClassVar[LoraBias]
    LORA_BIAS_ALL: _ClassVar[LoraBias]
    LORA_BIAS_LORA_ONLY: _ClassVar[LoraBias]
METHOD_TYPE_UNSPECIFIED: MethodType
METHOD_TYPE_LORA: MethodType
METHOD_TYPE_FULL: MethodType
METHOD_TYPE_DPO: MethodType
QUANTIZATION_UNSPECIFIED: Quantization
QUANTIZATION_NONE: Quantization
QUANTIZATION_NF4: Quantization
QUANTIZATION_INT8: Quantization
DPO_LOSS_TYPE_UNSPECIFIED: DpoLossType
DPO_LOSS_TYPE_SIGMOID: DpoLossType
DPO_LOSS_TYPE_HINGE: DpoLossType
DPO_LOSS_TYPE_IPO: DpoLossType
DPO_LOSS_TYPE_ROBUST: DpoLossType
OPTIMIZER_TYPE_UNSPECIFIED: OptimizerType
OPTIMIZER_TYPE_AUTO: OptimizerType
OPTIMIZER_TYPE_ADAMW: OptimizerType
OPTIMIZER_TYPE_ADAMW_8BIT: OptimizerType
OPTIMIZER_TYPE_ADAMW_BF16: OptimizerType
SCHEDULE_TYPE_UNSPECIFIED: ScheduleType
SCHEDULE_TYPE_LINEAR: ScheduleType
SCHEDULE_TYPE_COSINE: ScheduleType
SCHEDULE_TYPE_CONSTANT: ScheduleType
PRECISION_UNSPECIFIED: Precision
PRECISION_AUTO: Precision
PRECISION_FLOAT32: Precision
PRECISION_BFLOAT16: Precision
PRECISION_FLOAT16: Precision
LORA_BIAS_UNSPECIFIED: LoraBias
LORA_BIAS_NONE: LoraBias
LORA_BIAS_ALL: LoraBias
LORA_BIAS_LORA_ONLY: LoraBias

class LoraSpec(_message.Message):
    __slots__ = ("rank", "alpha", "dropout", "bias", "target_modules", "use_rslora", "use_dora", "b_learning_rate_ratio")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    USE_DORA_FIELD_NUMBER: _ClassVar[int]
    B_LEARNING_RATE_RATIO_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    dropout: float
    bias: LoraBias
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    use_rslora: bool
    use_dora: bool
    b_learning_rate_ratio: float
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., bias: _Optional[_Union[LoraBias, str]] = ..., target_modules: _Optional[_Iterable[str]] = ..., use_rslora: _Optional[bool] = ..., use_dora: _Optional[bool] = ..., b_learning_rate_ratio: _Optional[float] = ...) -> None: ...

class OptimizerSpec(_message.Message):
    __slots__ = ("type", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm", "schedule", "warmup_ratio", "min_warmup_steps", "embedding_learning_rate")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_RATIO_FIELD_NUMBER: _ClassVar[int]
    MIN_WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    type: OptimizerType
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    max_grad_norm: float
    schedule: ScheduleType
    warmup_ratio: float
    min_warmup_steps: int
    embedding_learning_rate: float
    def __init__(self, type: _Optional[_Union[OptimizerType, str]] = ..., learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., epsilon: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., schedule: _Optional[_Union[ScheduleType, str]] = ..., warmup_ratio: _Optional[float] = ..., min_warmup_steps: _Optional[int] = ..., embedding_learning_rate: _Optional[float] = ...) -> None: ...

class BatchSpec(_message.Message):
    __slots__ = ("micro_batch_size", "gradient_accumulation_steps", "max_tokens")
    MICRO_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    micro_batch_size: int
    gradient_accumulation_steps: int
    max_tokens: int
    def __init__(self, micro_batch_size: _Optional[int] = ..., gradient_accumulation_steps: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class CheckpointSpec(_message.Message):
    __slots__ = ("interval_steps", "keep")
    INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    interval_steps: int
    keep: int
    def __init__(self, interval_steps: _Optional[int] = ..., keep: _Optional[int] = ...) -> None: ...

class MemorySpec(_message.Message):
    __slots__ = ("budget", "host_budget_bytes", "offload_embeddings")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    HOST_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    budget: str
    host_budget_bytes: int
    offload_embeddings: bool
    def __init__(self, budget: _Optional[str] = ..., host_budget_bytes: _Optional[int] = ..., offload_embeddings: _Optional[bool] = ...) -> None: ...

class DpoSpec(_message.Message):
    __slots__ = ("beta", "loss_type", "label_smoothing")
    BETA_FIELD_NUMBER: _ClassVar[int]
    LOSS_TYPE_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    beta: float
    loss_type: DpoLossType
    label_smoothing: float
    def __init__(self, beta: _Optional[float] = ..., loss_type: _Optional[_Union[DpoLossType, str]] = ..., label_smoothing: _Optional[float] = ...) -> None: ...

class TrainingSpec(_message.Message):
    __slots__ = ("base_model", "method", "max_sequence_length", "lora", "optimizer", "batch", "checkpoint", "num_epochs", "max_steps", "seed", "precision", "quantization", "memory", "deterministic", "gpus", "dpo")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    NUM_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DPO_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    method: MethodType
    max_sequence_length: int
    lora: LoraSpec
    optimizer: OptimizerSpec
    batch: BatchSpec
    checkpoint: CheckpointSpec
    num_epochs: int
    max_steps: int
    seed: int
    precision: Precision
    quantization: Quantization
    memory: MemorySpec
    deterministic: bool
    gpus: int
    dpo: DpoSpec
    def __init__(self, base_model: _Optional[str] = ..., method: _Optional[_Union[MethodType, str]] = ..., max_sequence_length: _Optional[int] = ..., lora: _Optional[_Union[LoraSpec, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerSpec, _Mapping]] = ..., batch: _Optional[_Union[BatchSpec, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointSpec, _Mapping]] = ..., num_epochs: _Optional[int] = ..., max_steps: _Optional[int] = ..., seed: _Optional[int] = ..., precision: _Optional[_Union[Precision, str]] = ..., quantization: _Optional[_Union[Quantization, str]] = ..., memory: _Optional[_Union[MemorySpec, _Mapping]] = ..., deterministic: _Optional[bool] = ..., gpus: _Optional[int] = ..., dpo: _Optional[_Union[DpoSpec, _Mapping]] = ...) -> None: ...
