"""Specs: the one place where a field's default, bounds and meaning are written.

Protos mirror these models with optional fields; REST bodies are these models; a run's `spec.json` is one of them. All are
frozen and closed. `from_proto` and `to_proto` are the only way between wire and model: they go by field name, and an enum
value `OPTIMIZER_TYPE_ADAMW` is `"adamw"` here.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from finery_common.errors import InvalidArgumentError, Violation

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SERVABLE_LORA_RANK = 512

M = TypeVar("M", bound=Message)


class MethodType(StrEnum):
    LORA = "lora"


class OptimizerType(StrEnum):
    AUTO = "auto"
    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"


class ScheduleType(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class Precision(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class LoraBias(StrEnum):
    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"


class OutputFormat(StrEnum):
    SAFETENSORS = "safetensors"
    GGUF = "gguf"


class OutputType(StrEnum):
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"


class Spec(BaseModel):
    """Base of all specs: frozen, closed, and convertible from and to the proto message of the same field names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def from_proto(cls, message: Message) -> Self:
        """The spec that `message` means; unset fields take defaults. Raises InvalidArgumentError with one violation a field."""
        return cls.parse(_fields_set(message))

    @classmethod
    def parse(cls, fields: object) -> Self:
        """Validates plain data, such as a JSON body. Raises InvalidArgumentError with one violation a field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise invalid_fields(error, known=cls.model_fields.keys()) from error

    def to_proto(self, message_type: type[M]) -> M:
        """This spec as a `message_type`, every field set."""
        return _filled(message_type(), self.model_dump(mode="json", exclude_none=True))


class LoraSpec(Spec):
    """Low-rank adapters (Hu et al., arXiv:2106.09685) as PEFT names them."""

    rank: int = Field(default=16, ge=1, le=SERVABLE_LORA_RANK, strict=True)
    """Rank of A and B."""
    alpha: float = Field(default=16.0, gt=0, strict=True)
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
    dropout: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Probability of dropping an input of A."""
    bias: LoraBias = LoraBias.NONE
    """Which biases train too. Anything but none cannot be served as an adapter."""
    target_modules: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$")], ...] = Field(default=LINEAR_MODULES, min_length=1)
    """Names of the linear layers that get an adapter."""
    use_rslora: bool = Field(default=False, strict=True)
    """Scale by alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732)."""


class OptimizerSpec(Spec):
    """The optimizer and its learning-rate schedule."""

    type: OptimizerType = OptimizerType.AUTO
    """auto: adamw_8bit on a GPU, adamw on a CPU. adamw_8bit needs a GPU."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1, strict=True)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.01, ge=0, le=1, strict=True)
    """Decoupled (Loshchilov & Hutter, arXiv:1711.05101)."""
    beta1: float = Field(default=0.9, ge=0, lt=1, strict=True)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1, strict=True)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0, strict=True)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(default=1.0, gt=0, strict=True)
    """Gradients are scaled down to this global L2 norm."""
    schedule: ScheduleType = ScheduleType.LINEAR
    """How the rate falls after warm-up: linear and cosine towards 0, due after the last step."""
    warmup_ratio: float = Field(default=0.05, ge=0, le=1, strict=True)
    """Share of all steps spent rising from 0."""
    min_warmup_steps: int = Field(default=5, ge=0, strict=True)
    """Warm-up is at least this long, and never longer than the run."""


class BatchSpec(Spec):
    """How many rows an optimizer step sees: micro_batch_size x gradient_accumulation_steps."""

    micro_batch_size: int = Field(default=2, ge=1, le=1024, strict=True)
    """Rows a forward pass."""
    gradient_accumulation_steps: int = Field(default=4, ge=1, le=1024, strict=True)
    """Forward passes a step. The loss is normalised by the step's label count, so the split does not change the gradient."""


class CheckpointSpec(Spec):
    """When full states (adapter, optimizer, schedule, RNG, data cursor) are written, beside the end of every epoch."""

    interval_steps: int | None = Field(default=None, ge=1, strict=True)
    """Steps between full states; none: epochs only."""
    keep: int = Field(default=2, ge=1, le=100, strict=True)
    """Full states kept. Adapters of epochs are always kept."""


class TrainingSpec(Spec):
    """Everything that decides the numbers of a run, besides its data."""

    base_model: str = Field(min_length=1, max_length=200)
    """A base model of the catalogue."""
    method: MethodType = MethodType.LORA
    """What is trained."""
    max_sequence_length: int = Field(default=2048, ge=8, le=1_048_576, strict=True)
    """In tokens; a longer row is an error that names its line."""
    lora: LoraSpec = LoraSpec()
    """Adapter shape."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """Optimizer and schedule."""
    batch: BatchSpec = BatchSpec()
    """Rows a step."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Full states."""
    num_epochs: int = Field(default=1, ge=1, le=100, strict=True)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1, strict=True)
    """Stop after this many optimizer steps, even inside an epoch."""
    seed: int = Field(default=3407, ge=0, le=2**63 - 1, strict=True)
    """Of initialisation, shuffling and dropout."""
    precision: Precision = Precision.AUTO
    """Of weights and arithmetic. auto: bfloat16 on a GPU, float32 on a CPU."""


class DatasetSpec(Spec):
    """What a dataset is made from."""

    file: str = Field(pattern=r"^file-[0-9a-f]{24}$")
    """An uploaded file of this project."""
    base_model: str = Field(min_length=1, max_length=200)
    """Its tokenizer and chat template are used."""
    max_sequence_length: int = Field(default=2048, ge=8, le=1_048_576, strict=True)
    """In tokens; a longer row is an error that names its line."""


class ConversionSpec(Spec):
    """What is made of an adapter."""

    adapter: str = Field(pattern=r"^adapters/ftjob-[0-9a-f]{24}-[0-9]+$")
    """The adapter's key inside the project."""
    format: OutputFormat = OutputFormat.SAFETENSORS
    """safetensors: a merged Hugging Face folder. gguf: one file for llama.cpp."""
    type: OutputType = OutputType.BF16
    """Element type. q8_0 is GGUF's."""

    @model_validator(mode="after")
    def _type_belongs_to_format(self) -> Self:
        if self.format is OutputFormat.SAFETENSORS and self.type is OutputType.Q8_0:
            raise ValueError("type q8_0 exists in GGUF only; with format safetensors use bf16 or f16")
        return self


def invalid_fields(error: ValidationError, *, known: Iterable[str] = ()) -> InvalidArgumentError:
    """Pydantic's report as one InvalidArgumentError: what was got and what was wanted, by field."""
    violations = tuple(_violation(dict(item), known) for item in error.errors(include_url=False, include_context=False))
    text = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in violations)
    return InvalidArgumentError(text, param=violations[0].field or None, violations=violations)


def _violation(item: dict[str, Any], known: Iterable[str]) -> Violation:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        names = ", ".join(known) if len(item["loc"]) == 1 and known else "those in the documentation"
        return Violation(field, f"unknown field; known are {names}")
    if item["type"] == "missing":
        return Violation(field, "missing; it is required")
    got = "" if item["type"] == "value_error" else f"got {_short(item['input'])}, "
    return Violation(field, got + plain_words(str(item["msg"])))


def plain_words(message: str) -> str:
    """Pydantic's words for one input as ours: what was wanted."""
    message = message.removeprefix("Value error, ").replace("Input should be", "wanted")
    return message.replace("String should match pattern", "wanted text that matches")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_set(message: Message) -> dict[str, Any]:
    return {field.name: _plain(field, value) for field, value in message.ListFields()}


def _plain(field: Any, value: Any) -> Any:
    if field.is_repeated:
        return tuple(_plain_one(field, item) for item in value)
    return _plain_one(field, value)


def _plain_one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _fields_set(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return str(value) if known is None else known.name.removeprefix(_enum_prefix(field)).lower()
    return value


def _filled(message: M, values: dict[str, Any]) -> M:
    for name, value in values.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.is_repeated:
            getattr(message, name).extend(value)
        elif field.message_type is not None:
            _filled(getattr(message, name), value)
            getattr(message, name).SetInParent()
        elif field.enum_type is not None:
            setattr(message, name, field.enum_type.values_by_name[_enum_prefix(field) + value.upper()].number)
        else:
            setattr(message, name, value)
    return message


def _enum_prefix(field: Any) -> str:
    """`OPTIMIZER_TYPE_` for the enum `OptimizerType`, as buf's style asks of every value."""
    name: str = field.enum_type.values_by_number[0].name
    return name.removesuffix("UNSPECIFIED")
