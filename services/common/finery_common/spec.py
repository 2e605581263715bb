"""Specs: the one place where a field's default, bounds and meaning are written.

Protos mirror these models with optional fields; REST bodies are these models; a run's `spec.json` is one of them. All are
frozen and closed. `from_proto` and `to_proto` are the only way between wire and model: they go by field name, and an enum
value `OPTIMIZER_TYPE_ADAMW` is `"adamw"` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from math import inf
from typing import Annotated, Any, Self, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from finery_common.errors import InvalidArgumentError, Violation
from finery_common.text_forms import FILE_ID, in_words, text_form

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SERVABLE_LORA_RANK = 512
_EMBEDDING_MODULES = frozenset({"embed_tokens", "lm_head"})
_MODULE = text_form(r"^[A-Za-z0-9_.]+$", "a module's name: letters, digits, _ and .")
_BYTES_OF_UNIT = {"": 1, "MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_BUDGET = r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?(MB|GB|MiB|GiB)?"

M = TypeVar("M", bound=Message)


class MethodType(StrEnum):
    LORA = "lora"
    FULL = "full"
    DPO = "dpo"


class Quantization(StrEnum):
    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"


class DpoLossType(StrEnum):
    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    ROBUST = "robust"


class OptimizerType(StrEnum):
    AUTO = "auto"
    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    ADAMW_BF16 = "adamw_bf16"


class ScheduleType(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class Precision(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LoraBias(StrEnum):
    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"


class DatasetType(StrEnum):
    SUPERVISED = "supervised"
    PREFERENCE = "preference"


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
            raise invalid_fields(error, model=cls) from error

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
    target_modules: tuple[Annotated[str, StringConstraints(pattern=_MODULE)], ...] = Field(default=LINEAR_MODULES, min_length=1)
    """Names of the linear layers that get an adapter."""
    use_rslora: bool = Field(default=False, strict=True)
    """Scale by alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732)."""
    use_dora: bool = Field(default=False, strict=True)
    """Also train the length of each output's weight vector (DoRA, Liu et al., arXiv:2402.09353). Cannot be served as an adapter."""
    b_learning_rate_ratio: float = Field(default=1.0, gt=0, le=1000, strict=True)
    """Learning rate of B over that of A (LoRA+, Hayou et al., arXiv:2402.12354, who advise about 16); A has optimizer.learning_rate."""

    @model_validator(mode="after")
    def _dora_trains_no_bias(self) -> Self:
        if self.use_dora and self.bias is not LoraBias.NONE:
            raise conflict("use_dora", f"got true with bias {self.bias.value}, wanted one of the two")
        return self


class OptimizerSpec(Spec):
    """The optimizer and its learning-rate schedule."""

    type: OptimizerType = OptimizerType.AUTO
    """auto: adamw_8bit on a GPU, adamw on a CPU. adamw_8bit and adamw_bf16 keep their two moments in 8 and 16 bits, adamw in 32."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1, strict=True)
    """Peak learning rate. In a TrainingSpec the default is its method's: 2e-4 with lora, 2e-5 with full, 5e-6 with dpo."""
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
    embedding_learning_rate: float | None = Field(default=None, gt=0, le=1, strict=True)
    """Peak learning rate of the input embeddings and the output head, where they train; none: learning_rate."""


class BatchSpec(Spec):
    """How many rows an optimizer step sees: micro_batch_size x gradient_accumulation_steps."""

    micro_batch_size: int = Field(default=2, ge=1, le=1024, strict=True)
    """Rows a forward pass."""
    gradient_accumulation_steps: int = Field(default=4, ge=1, le=1024, strict=True)
    """Forward passes a step. The loss is normalised by the step's label count, so the split does not change the gradient."""
    max_tokens: int | None = Field(default=None, ge=8, strict=True)
    """Most tokens that are packed into one forward pass, over the rows of one step; none: what the memory budget allows. The
    gradient does not depend on it."""


class CheckpointSpec(Spec):
    """When full states (adapter, optimizer, schedule, RNG, data cursor) are written, beside the end of every epoch."""

    interval_steps: int | None = Field(default=None, ge=1, strict=True)
    """Steps between full states; none: epochs only."""
    keep: int = Field(default=2, ge=1, le=100, strict=True)
    """Full states kept. Adapters of epochs are always kept."""


class MemorySpec(Spec):
    """What memory a run may use. The numbers of a run do not depend on it, but for the order of sums."""

    budget: str = "auto"
    """Of the GPU's memory: `auto` for what is free, a fraction of it up to 1 such as 0.9, or bytes, also as 24GiB or 24GB. A JSON
    number is taken as well. See `budget_bytes`."""
    host_budget_bytes: int | None = Field(default=None, ge=0, strict=True)
    """Pinned host memory in bytes that activations may be moved to; none: half of what is free. 0: nothing is moved."""
    offload_embeddings: bool = Field(default=False, strict=True)
    """Keep frozen input embeddings in host memory, and look their rows up there."""

    @field_validator("budget", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("budget")
    @classmethod
    def _is_positive(cls, value: str) -> str:
        if value == "auto":
            return value
        number = _budget_number(value) if re.fullmatch(_BUDGET, value) else 0.0
        has_unit = value.endswith("B")
        # 1.5 is a fraction gone wrong, and a byte with a unit would be taken for one.
        if not 0 < number < inf or (not has_unit and number > 1 and not number.is_integer()) or (has_unit and number <= 1):
            raise ValueError(f"got {value!r}, wanted auto, a fraction up to 1, or a number of bytes, such as 24GiB")
        return value

    def budget_bytes(self, free_bytes: int) -> int:
        """The budget on a GPU of which `free_bytes` are free for this run; never more than those."""
        if self.budget == "auto":
            return free_bytes
        number = _budget_number(self.budget)
        return min(free_bytes, int(number * free_bytes) if number <= 1 else int(number))


class DpoSpec(Spec):
    """Direct preference optimization (Rafailov et al., arXiv:2305.18290); the base model without its adapter is the reference."""

    beta: float = Field(default=0.1, gt=0, le=100, strict=True)
    """How strongly the model is held to the reference; the tau of ipo."""
    loss_type: DpoLossType = DpoLossType.SIGMOID
    """sigmoid: DPO's own. hinge: SLiC (arXiv:2305.10425). ipo: arXiv:2310.12036. robust: arXiv:2403.00409."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, strict=True)
    """Share of pairs assumed to be the wrong way around; for loss type robust, whose default of 0 is sigmoid."""

    @model_validator(mode="after")
    def _smoothing_belongs_to_robust(self) -> Self:
        if self.label_smoothing and self.loss_type is not DpoLossType.ROBUST:
            text = f"got {self.label_smoothing} with loss_type {self.loss_type.value}, wanted 0; it belongs to loss_type robust"
            raise conflict("label_smoothing", text)
        return self


LEARNING_RATES = {MethodType.LORA: 2e-4, MethodType.FULL: 2e-5, MethodType.DPO: 5e-6}
"""Default of `optimizer.learning_rate` by method."""


class TrainingSpec(Spec):
    """Everything that decides the numbers of a run, besides its data."""

    base_model: str = Field(min_length=1, max_length=200)
    """A base model of the catalogue."""
    method: MethodType = MethodType.LORA
    """lora: adapters, on the rows of a chat file (QLoRA is lora with quantization nf4). full: every weight, on the same rows.
    dpo: adapters, on the pairs of a preference file."""
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
    """Of weights and arithmetic, whatever the files have. auto: bfloat16 on a GPU, float32 on a CPU. float16, for adapters, scales the
    loss, since gradients do not fit its range (arXiv:1710.03740); activations of a model made in bfloat16 may not fit either."""
    quantization: Quantization = Quantization.NONE
    """Of the decoder's frozen linear weights. nf4: 4 bits with doubly quantized scales (Dettmers et al., arXiv:2305.14314). int8:
    8 bits (arXiv:2208.07339)."""
    memory: MemorySpec = MemorySpec()
    """What memory the run may use."""
    deterministic: bool | None = Field(default=None, strict=True)
    """Two runs with one seed are bit-equal, and a resumed one equals one never stopped. None: on a CPU on, on a GPU off."""
    gpus: int = Field(default=1, ge=1, le=64, strict=True)
    """GPUs of one machine that share each step's rows, of plain adapters on models of the engine's own families. On a CPU it is 1."""
    dpo: DpoSpec = DpoSpec()
    """The loss of method dpo."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_method(cls, data: Any) -> Any:
        method = data.get("method") if isinstance(data, dict) else None
        if not isinstance(method, str) or method not in set(LEARNING_RATES):
            return data
        optimizer = data.get("optimizer", {})
        given = optimizer.model_dump(exclude_unset=True) if isinstance(optimizer, OptimizerSpec) else optimizer
        if not isinstance(given, dict) or "learning_rate" in given:
            return data
        return data | {"optimizer": given | {"learning_rate": LEARNING_RATES[MethodType(method)]}}

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        for is_there, field, text in _conflicts(self):
            if is_there:
                raise conflict(field, text)
        return self


def _conflicts(spec: TrainingSpec) -> Iterator[tuple[bool, str, str]]:
    """Every combination of fields that cannot hold: whether it is there, the field to change, and what to say of it."""
    method, is_full, is_dpo = spec.method.value, spec.method is MethodType.FULL, spec.method is MethodType.DPO
    splits_rows = spec.batch.max_tokens is not None and spec.batch.max_tokens < spec.max_sequence_length
    trains_embeddings = is_full or not _EMBEDDING_MODULES.isdisjoint(spec.lora.target_modules)
    yield (
        is_full and spec.quantization is not Quantization.NONE,
        "quantization",
        f"got {spec.quantization.value} with method full, wanted none; only frozen weights can be quantized, as those of method lora",
    )
    yield (
        is_full and spec.precision is Precision.FLOAT16,
        "precision",
        "got float16 with method full, wanted bfloat16 or float32; most updates are too small for a float16 weight to change by them",
    )
    yield is_full and spec.lora != LoraSpec(), "lora", "got an adapter's shape with method full, which has no adapter; leave it out"
    yield spec.dpo != DpoSpec() and not is_dpo, "dpo", f"got a loss with method {method}; leave it out, or use method dpo"
    yield (
        spec.gpus > 1 and spec.method is not MethodType.LORA,
        "gpus",
        f"got {spec.gpus} with method {method}, wanted 1; several GPUs train method lora only (with quantization none or nf4)",
    )
    alone = next(_alone(spec), None) if method == MethodType.LORA else None
    yield spec.gpus > 1 and alone is not None, "gpus", f"got {spec.gpus} with {alone}, wanted 1; several GPUs train plain adapters only"
    yield (
        spec.optimizer.embedding_learning_rate is not None and not trains_embeddings,
        "optimizer.embedding_learning_rate",
        f"got a rate with method {method}, where neither embeddings nor head train; leave it out, or put lm_head into lora.target_modules",
    )
    yield (
        is_full and spec.memory.offload_embeddings,
        "memory.offload_embeddings",
        "got true with method full, which trains the embeddings; only frozen ones can stay in host memory",
    )
    yield (
        is_dpo and spec.lora.bias is not LoraBias.NONE,
        "lora.bias",
        f"got {spec.lora.bias.value} with method dpo, wanted none; the model without its adapter is the reference, and biases stay in it",
    )
    yield (
        is_dpo and "lm_head" in spec.lora.target_modules,
        "lora.target_modules",
        "got lm_head with method dpo, whose loss reads the head's own weights; leave it out",
    )
    yield is_dpo and spec.memory != MemorySpec(), "memory", "got limits with method dpo, which keeps none; leave it out"
    yield (
        is_dpo and spec.batch.max_tokens is not None,
        "batch.max_tokens",
        "got a number with method dpo, whose pairs are not packed; use batch.micro_batch_size",
    )
    yield (
        splits_rows,
        "batch.max_tokens",
        f"got {spec.batch.max_tokens}, wanted at least max_sequence_length, {spec.max_sequence_length}: no row is split",
    )


def _alone(spec: TrainingSpec) -> Iterator[str]:
    """What of a run with adapters is for one GPU: the engine's own layers do not take it, whatever the model."""
    lora = spec.lora
    if spec.quantization is Quantization.INT8:
        yield "quantization int8"
    if lora.use_dora:
        yield "lora.use_dora"
    if lora.dropout:
        yield f"lora.dropout {lora.dropout}"
    if lora.bias is not LoraBias.NONE:
        yield f"lora.bias {lora.bias.value}"
    if "lm_head" in lora.target_modules:
        yield "lm_head in lora.target_modules"


def conflict(field: str, text: str) -> PydanticCustomError:
    """An error of several fields that names the one to change."""
    return PydanticCustomError("conflict", "{text}", {"field": field, "text": text})


class DatasetSpec(Spec):
    """What a dataset is made from."""

    file: str = Field(pattern=FILE_ID)
    """An uploaded file of this project."""
    base_model: str = Field(min_length=1, max_length=200)
    """Its tokenizer and chat template are used."""
    max_sequence_length: int = Field(default=2048, ge=8, le=1_048_576, strict=True)
    """In tokens; a longer row is an error that names its line."""
    type: DatasetType = DatasetType.SUPERVISED
    """supervised: rows of chat, or of prompt and completion. preference: rows of an input with a preferred and another output."""


def invalid_fields(error: ValidationError, *, model: type[BaseModel] | None = None) -> InvalidArgumentError:
    """Pydantic's report, of `model`, as one InvalidArgumentError: what was got and what was wanted, by field."""
    violations = tuple(_violation(dict(item), model) for item in error.errors(include_url=False))
    text = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in violations)
    return InvalidArgumentError(text, param=violations[0].field or None, violations=violations)


def _budget_number(text: str) -> float:
    """The number that a memory budget other than auto writes: a fraction, or bytes."""
    match = re.fullmatch(r"([0-9.e+-]+)([A-Za-z]*)", text)
    assert match is not None
    return float(match[1]) * _BYTES_OF_UNIT[match[2]]


def place_of(item: Mapping[str, Any]) -> list[str]:
    """Where one of pydantic's errors lies, part by part; of fields that conflict, the one to change."""
    return [*map(str, item["loc"]), *([str(item["ctx"]["field"])] if item["type"] == "conflict" else [])]


def _violation(item: dict[str, Any], model: type[BaseModel] | None) -> Violation:
    field = ".".join(place_of(item))
    if item["type"] == "extra_forbidden":
        known = _known_beside(item["loc"], model)
        return Violation(field, f"unknown field; known are {', '.join(known) or 'those in the documentation'}")
    if item["type"] == "missing":
        return Violation(field, "missing; it is required")
    got = "" if item["type"] in ("value_error", "conflict") else f"got {_short(item['input'])}, "
    return Violation(field, got + plain_words(str(item["msg"])))


def _known_beside(location: tuple[int | str, ...], model: type[BaseModel] | None) -> Iterable[str]:
    """The fields that there are where an unknown one was found."""
    for part in location[:-1]:
        field = None if model is None else model.model_fields.get(str(part))
        kind = None if field is None else field.annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return () if model is None else model.model_fields.keys()


def plain_words(message: str) -> str:
    """Pydantic's words for one input as ours: what was wanted."""
    message = message.removeprefix("Value error, ").replace("Input should be", "wanted")
    return in_words(message).replace("a valid tuple", "a list")


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
        if field.is_repeated and field.message_type is not None:
            for item in value:
                _filled(getattr(message, name).add(), item)
        elif field.is_repeated:
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
