"""OpenAI's body of a fine-tuning job as our TrainingSpec, and a spec as OpenAI's hyperparameters.

How they meet:
- `method.type` supervised is whatever `spec.method` says, lora unless it says more; dpo is `spec.method` dpo, and its `beta` `dpo.beta`.
- `n_epochs` is `num_epochs`.
- `batch_size` is the rows of one optimizer step: `micro_batch_size` is the largest divisor of it up to the spec's default, and
  `gradient_accumulation_steps` the rest.
- `learning_rate_multiplier` is a factor on the spec's default `optimizer.learning_rate` for its method.
- `"auto"`, or nothing, is the spec's default.
- `spec` (in `extra_body`) holds any TrainingSpec field. What is said twice must agree.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from finery_common.errors import InvalidArgumentError, UnimplementedError, Violation
from finery_common.spec import LEARNING_RATES, BatchSpec, MethodType, TrainingSpec

MAX_METADATA_PAIRS = 16
SUFFIX = re.compile(r"[a-z0-9-]{0,64}")
_DEFAULT_MICRO_BATCH_SIZE = BatchSpec.model_validate({}).micro_batch_size
_SUPPORTED = "supported are method.type 'supervised' and 'dpo'"


class Closed(BaseModel):
    """A JSON object whose every field is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Hyperparameters(Closed):
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, strict=True)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, strict=True)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, strict=True)] | None = None


class DpoHyperparameters(Hyperparameters):
    beta: Literal["auto"] | Annotated[float, Field(gt=0, strict=True)] | None = None


class Supervised(Closed):
    hyperparameters: Hyperparameters | None = None


class Dpo(Closed):
    hyperparameters: DpoHyperparameters | None = None


class Method(Closed):
    type: str
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None
    """Not supported."""


class JobFields(Closed):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(min_length=1, max_length=200)
    """A base model of the catalogue."""
    training_file: str
    """The id of an uploaded file."""
    validation_file: str | None = None
    """The id of an uploaded file; its loss is measured at every epoch's end."""
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated: use `method`."""
    suffix: str | None = None
    """At most 64 of a-z, 0-9 and -; part of the model's name."""
    seed: int | None = Field(None, ge=0, strict=True)
    metadata: (
        dict[Annotated[str, StringConstraints(min_length=1, max_length=64)], Annotated[str, StringConstraints(max_length=512)]] | None
    ) = Field(None, max_length=MAX_METADATA_PAIRS)
    integrations: list[Any] | None = None
    """Not supported."""
    spec: dict[str, Any] | None = None
    """Fields of TrainingSpec, beyond OpenAI's."""
    deploy: bool | None = Field(None, strict=True)
    """Whether the model is deployed when the job has succeeded; true unless said otherwise."""

    @field_validator("suffix")
    @classmethod
    def _suffix_fits_a_name(cls, value: str | None) -> str | None:
        if value is not None and not SUFFIX.fullmatch(value):
            raise ValueError(f"got {value!r}, wanted at most 64 of a-z, 0-9 and -")
        return value

    def require_supported(self) -> Self:
        """Raises UnimplementedError for what OpenAI has and this installation has not, saying what it has."""
        if self.integrations:
            raise UnimplementedError(
                "integrations: none is supported; metrics are in the job's events, its result file and Prometheus.", param="integrations"
            )
        if self.method is None:
            return self
        if self.method.type not in ("supervised", "dpo"):
            raise UnimplementedError(f"method.type: got {self.method.type!r}; {_SUPPORTED}.", param="method.type")
        if self.method.reinforcement is not None:
            raise UnimplementedError(f"method.reinforcement: not supported; {_SUPPORTED}.", param="method.reinforcement")
        other = "dpo" if self.method.type == "supervised" else "supervised"
        if getattr(self.method, other) is not None:
            raise InvalidArgumentError(
                f"method.{other}: got settings with method.type {self.method.type!r}; leave them out, or use method.type {other!r}.",
                param=f"method.{other}",
            )
        return self

    def training_spec(self) -> TrainingSpec:
        """What the job trains with. Raises InvalidArgumentError, by field, for bounds and for what is said twice and differs."""
        spec = dict(self.spec or {})
        _merge(spec, "base_model", self.model, said_by="model")
        if self.seed is not None:
            _merge(spec, "seed", self.seed, said_by="seed")
        self._merge_method(spec)
        given = self._hyperparameters()
        if isinstance(given.n_epochs, int):
            _merge(spec, "num_epochs", given.n_epochs, said_by="n_epochs")
        if isinstance(given.batch_size, int):
            _merge(spec, "batch", _batch(given.batch_size), said_by="batch_size")
        if isinstance(given.learning_rate_multiplier, float):
            rate = given.learning_rate_multiplier * _default_rate(spec)
            _merge_inside(spec, "optimizer", "learning_rate", rate, said_by="learning_rate_multiplier")
        if isinstance(given, DpoHyperparameters) and isinstance(given.beta, float):
            _merge_inside(spec, "dpo", "beta", given.beta, said_by="beta")
        return _parsed(spec)

    def _merge_method(self, spec: dict[str, Any]) -> None:
        if self.method is None:
            return
        if self.method.type == "dpo":
            _merge(spec, "method", MethodType.DPO.value, said_by="method.type")
        elif spec.get("method") == MethodType.DPO:
            raise InvalidArgumentError("spec.method: got 'dpo', but method.type says 'supervised'; say it once.", param="spec.method")

    def _hyperparameters(self) -> Hyperparameters:
        settings = None if self.method is None else self.method.dpo if self.method.type == "dpo" else self.method.supervised
        new, old = None if settings is None else settings.hyperparameters, self.hyperparameters
        if new is None or old is None:
            return new or old or Hyperparameters()
        if any(getattr(new, name) != getattr(old, name) for name in Hyperparameters.model_fields):
            where = "supervised" if self.method is None else self.method.type
            raise InvalidArgumentError(
                f"hyperparameters: said twice and differently; leave it out and use method.{where}.hyperparameters.",
                param="hyperparameters",
            )
        return new


def shown_hyperparameters(spec: TrainingSpec) -> dict[str, Any]:
    """What the spec means in OpenAI's terms; "auto" is resolved."""
    return {
        "n_epochs": spec.num_epochs,
        "batch_size": spec.batch.micro_batch_size * spec.batch.gradient_accumulation_steps,
        "learning_rate_multiplier": round(spec.optimizer.learning_rate / LEARNING_RATES[spec.method], 9),
    }


def shown_method(spec: TrainingSpec) -> dict[str, Any]:
    """OpenAI's `method` of the spec."""
    hyperparameters = shown_hyperparameters(spec)
    if spec.method is MethodType.DPO:
        return {"type": "dpo", "dpo": {"hyperparameters": {**hyperparameters, "beta": spec.dpo.beta}}}
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def _default_rate(spec: dict[str, Any]) -> float:
    method = spec.get("method", MethodType.LORA)
    # What is no method is refused when the spec is parsed.
    return LEARNING_RATES[MethodType(method)] if method in list(MethodType) else 1.0


def _merge_inside(spec: dict[str, Any], part: str, field: str, value: object, *, said_by: str) -> None:
    inner = spec.get(part, {})
    if not isinstance(inner, dict):
        raise InvalidArgumentError(f"spec.{part}: got {inner!r}, wanted an object", param=f"spec.{part}")
    spec[part] = dict(cast("dict[str, Any]", inner))
    _merge(spec[part], field, value, said_by=said_by, inside=f"{part}.")


def _merge(spec: dict[str, Any], field: str, value: object, *, said_by: str, inside: str = "") -> None:
    if field in spec and spec[field] != value:
        name = f"spec.{inside}{field}"
        raise InvalidArgumentError(f"{name}: got {spec[field]!r}, but {said_by} says {value!r}; say it once.", param=name)
    spec[field] = value


def _batch(batch_size: int) -> dict[str, int]:
    micro = next(size for size in range(_DEFAULT_MICRO_BATCH_SIZE, 0, -1) if batch_size % size == 0)
    return {"micro_batch_size": micro, "gradient_accumulation_steps": batch_size // micro}


def _parsed(fields: dict[str, Any]) -> TrainingSpec:
    try:
        return TrainingSpec.parse(fields)
    except InvalidArgumentError as error:
        violations = tuple(Violation(f"spec.{item.field}" if item.field else "spec", item.description) for item in error.violations)
        text = "; ".join(f"{item.field}: {item.description}" for item in violations)
        raise InvalidArgumentError(text, param=violations[0].field, violations=violations) from error
