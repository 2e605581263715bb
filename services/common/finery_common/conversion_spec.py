"""What a conversion is asked for: its source, the format and type that come out, and where else they go.

Owns which fields fit together, as `finery_common.spec` does of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Self

from pydantic import Field, field_validator, model_validator

from finery_common.spec import Spec, conflict
from finery_common.text_forms import text_form


class OutputFormat(StrEnum):
    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    ADAPTER = "adapter"
    GGUF_ADAPTER = "gguf_adapter"


class OutputType(StrEnum):
    """In the words of the formats' own tools; what follows q8_0 are llama.cpp's quantization types, from wide to narrow."""

    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"
    F32 = "f32"
    NF4 = "nf4"
    FP8 = "fp8"
    FP8_BLOCK = "fp8_block"
    Q6_K = "q6_k"
    Q5_K_M = "q5_k_m"
    Q5_K_S = "q5_k_s"
    Q4_K_M = "q4_k_m"
    Q4_K_S = "q4_k_s"
    Q4_0 = "q4_0"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    Q3_K_L = "q3_k_l"
    Q3_K_M = "q3_k_m"
    IQ3_M = "iq3_m"
    IQ3_S = "iq3_s"
    IQ3_XXS = "iq3_xxs"
    Q2_K = "q2_k"
    IQ2_M = "iq2_m"
    IQ2_S = "iq2_s"
    IQ2_XS = "iq2_xs"
    IQ2_XXS = "iq2_xxs"
    IQ1_M = "iq1_m"
    IQ1_S = "iq1_s"

    @classmethod
    def _missing_(cls, value: object) -> OutputType | None:
        """llama.cpp's own spelling is Q4_K_M."""
        is_known = isinstance(value, str) and value != value.lower() and value.lower() in set(cls)
        return cls(str(value).lower()) if is_known else None


class Combination(StrEnum):
    LINEAR = "linear"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    CAT = "cat"


class BaseWeights(StrEnum):
    TRAINED = "trained"
    ORIGINAL = "original"


_ADAPTER_KEY = text_form(
    r"^adapters/ftjob-[0-9a-f]{24}-[0-9]+$", "adapters/ with job and step, such as adapters/ftjob-…-20, as `finery artifacts list` shows it"
)
_MODEL_KEY = text_form(r"^models/ftjob-[0-9a-f]{24}$", "models/ and the id of the job that trained it")
_DATASET_KEY = text_form(r"^datasets/ds-[0-9a-f]{24}$", "datasets/ and the dataset's id")
_REPOSITORY = text_form(
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$", "owner/name, each of letters, digits, _ . and -"
)
_SECRET = text_form(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", "the secret's name: at most 63 letters, digits, _ . and -")
_BRANCH = text_form(r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,127}$", "a branch's name: at most 128 letters, digits, _ . / and -")
_T = OutputType
OUTPUT_TYPES: dict[OutputFormat, tuple[OutputType, ...]] = {
    OutputFormat.SAFETENSORS: (_T.BF16, _T.F16, _T.F32, _T.NF4, _T.FP8, _T.FP8_BLOCK),
    OutputFormat.GGUF: (_T.F16, _T.BF16, *(item for item in _T if item not in (_T.F16, _T.BF16, _T.NF4, _T.FP8, _T.FP8_BLOCK))),
    OutputFormat.ADAPTER: (_T.F32,),
    OutputFormat.GGUF_ADAPTER: (_T.F16, _T.BF16, _T.F32, _T.Q8_0),
}
"""The types of each format; the first is its default."""
_WIDE_GGUF = frozenset({_T.F32, _T.F16, _T.BF16, _T.Q8_0})
NEED_IMPORTANCE = frozenset({_T.IQ3_XXS, _T.IQ2_M, _T.IQ2_S, _T.IQ2_XS, _T.IQ2_XXS, _T.IQ1_M, _T.IQ1_S})
"""Types that say nothing sensible without an importance matrix."""


class WeightedAdapter(Spec):
    """One of several adapters that are combined."""

    adapter: str = Field(pattern=_ADAPTER_KEY)
    """The adapter's key inside the project."""
    weight: float = Field(default=1.0, ge=-10, le=10, strict=True)
    """Its share of the sum; negative takes away what it has learnt."""


class HubSpec(Spec):
    """A Hugging Face repository that the result is pushed to."""

    repository: str = Field(pattern=_REPOSITORY)
    """`owner/name`; made where it is missing."""
    token: str = Field(default="default", pattern=_SECRET)
    """Name of the secret that holds the token, as the converter's operator has set it; never the token itself."""
    private: bool = Field(default=True, strict=True)
    """Of a repository that is made."""
    revision: str = Field(default="main", pattern=_BRANCH)
    """The branch."""

    @field_validator("token")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        # A token's own text must not come back in an error.
        if value.startswith("hf_"):
            raise ValueError("got what looks like a token itself, wanted the name of the secret that holds it; withdraw that token")
        return value


class ConversionSpec(Spec):
    """What is made of an adapter, of several, or of a fully tuned model. One of `adapter`, `adapters` and `model` is given."""

    adapter: str | None = Field(default=None, pattern=_ADAPTER_KEY)
    """The adapter's key inside the project."""
    format: OutputFormat = OutputFormat.SAFETENSORS
    """safetensors: a merged Hugging Face folder. gguf: for llama.cpp, with a Modelfile for Ollama where the chat template has an equal
    there. adapter: PEFT's files, scaled or combined. gguf_adapter: an adapter for llama.cpp to apply to its base."""
    type: OutputType | None = None
    """Element type; none: bf16 for safetensors, f16 for gguf and gguf_adapter, f32 for adapter. nf4: bitsandbytes' 4 bits. fp8 and
    fp8_block: e4m3 with a scale for each output and for each 128 x 128 block. The others are GGUF's own."""
    model: str | None = Field(default=None, pattern=_MODEL_KEY)
    """The key of a model that method full has trained."""
    adapters: tuple[WeightedAdapter, ...] = Field(default=(), max_length=16)
    """Adapters of one base model that are combined into one."""
    combination: Combination = Combination.CAT
    """How, in the words of PEFT's `add_weighted_adapter`. cat: the weighted sum of what the adapters add, exactly; its rank is the sum of
    theirs. linear: weighted sums of their matrices, of one rank. ties: Yadav et al., arXiv:2306.01708. dare_linear and dare_ties: Yu
    et al., arXiv:2311.03099."""
    density: float | None = Field(default=None, gt=0, le=1, strict=True)
    """Share of an adapter's values that ties and dare keep."""
    scale: float = Field(default=1.0, gt=0, le=10, strict=True)
    """The adapter's update is multiplied by it."""
    base_weights: BaseWeights = BaseWeights.TRAINED
    """What an adapter that was trained on NF4 weights is merged into. trained: those weights, dequantized, so that the result is the
    model that was trained. original: the base's own; closer to the base, no longer what the adapter was trained to correct."""
    calibration_dataset: str | None = Field(default=None, pattern=_DATASET_KEY)
    """A prepared dataset of the project: the importance matrix is made of its rows, and as many of them as of the converter's own texts are
    compared on beside those."""
    importance_matrix: bool | None = Field(default=None, strict=True)
    """Weigh GGUF's rounding by the squares of each input. None: for the iq types, the lower of which are nothing without it."""
    max_file_size_bytes: int | None = Field(default=None, ge=1_000_000, strict=True)
    """Files of weights are split at this size; none: safetensors as the base is, GGUF in one file."""
    hub: HubSpec | None = None
    """Where to push the result, beside the object store."""

    @property
    def element_type(self) -> OutputType:
        """The type, or its format's default."""
        return self.type or OUTPUT_TYPES[self.format][0]

    @property
    def weighs_inputs(self) -> bool:
        """Whether an importance matrix is made."""
        return self.element_type.startswith("iq") if self.importance_matrix is None else self.importance_matrix

    @property
    def sources(self) -> tuple[WeightedAdapter, ...]:
        """The adapters, one or several; none where `model` is given."""
        return self.adapters if self.adapter is None else (WeightedAdapter(adapter=self.adapter),)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        for is_there, field, text in _conflicts(self):
            if is_there:
                raise conflict(field, text)
        return self


def _conflicts(spec: ConversionSpec) -> Iterator[tuple[bool, str, str]]:
    """Every combination of fields that cannot hold: whether it is there, the field to change, and what to say of it."""
    given = [name for name in ("adapter", "adapters", "model") if getattr(spec, name)]
    types, is_gguf, whole = OUTPUT_TYPES[spec.format], spec.format is OutputFormat.GGUF, spec.model is not None
    combines, is_adapter = bool(spec.adapters), spec.format in (OutputFormat.ADAPTER, OutputFormat.GGUF_ADAPTER)
    keeps_some = spec.combination not in (Combination.CAT, Combination.LINEAR)
    yield len(given) != 1, "adapter", f"got {' and '.join(given) or 'none of adapter, adapters and model'}, wanted one of these three"
    yield (
        spec.element_type not in types,
        "type",
        f"got {spec.element_type.value} with format {spec.format.value}, wanted one of {', '.join(types)}",
    )
    yield combines and len(spec.adapters) < 2, "adapters", "got one, wanted two or more; a single one goes into adapter"
    names = [item.adapter for item in spec.adapters]
    yield len(names) > len(set(names)), "adapters", "got an adapter twice, wanted each once; add up its weights"
    yield combines and not any(item.weight for item in spec.adapters), "adapters", "got a weight of 0 for each, wanted one that is not"
    yield spec.combination is not Combination.CAT and not combines, "combination", "got a way to combine without adapters; leave it out"
    yield keeps_some and spec.density is None, "density", f"got none with combination {spec.combination.value}, wanted 0 to 1, such as 0.5"
    yield (
        spec.density is not None and not keeps_some,
        "density",
        f"got a number with combination {spec.combination.value}, which keeps all; leave it out",
    )
    yield whole and is_adapter, "format", f"got {spec.format.value} with a whole model, wanted safetensors or gguf"
    yield whole and spec.scale != 1, "scale", "got a number with a whole model, which has no adapter to scale; leave it out"
    keeps_base = whole or is_adapter
    chosen = spec.base_weights is not BaseWeights.TRAINED
    yield chosen and keeps_base, "base_weights", "got original where nothing is merged; leave it out"
    yield spec.importance_matrix is not None and not is_gguf, "importance_matrix", "got a choice without format gguf; leave it out"
    yield (
        spec.importance_matrix is True and is_gguf and spec.element_type in _WIDE_GGUF,
        "importance_matrix",
        f"got true with type {spec.element_type.value}, whose rounding it does not change; leave it out",
    )
    yield (
        spec.importance_matrix is False and spec.element_type in NEED_IMPORTANCE,
        "importance_matrix",
        f"got false with type {spec.element_type.value}, which needs it; leave it out",
    )
    yield (
        spec.calibration_dataset is not None and spec.format is OutputFormat.ADAPTER,
        "calibration_dataset",
        f"got one with format {spec.format.value}, which measures nothing; leave it out",
    )
    yield (
        spec.max_file_size_bytes is not None and is_adapter,
        "max_file_size_bytes",
        f"got a size with format {spec.format.value}, whose weights are one file; leave it out",
    )
