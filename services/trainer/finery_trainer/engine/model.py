"""The model being trained: a local Hugging Face folder in the wanted precision, quantized or not, with LoRA layers in PEFT's names.

Owns what a spec makes of a folder. Weights are read by transformers: tensor by tensor out of mapped files, each moved to its device and,
where it is to be, quantized there before the next one is read; so neither host nor device ever holds much more than the finished model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import LoraSpec, MethodType, Precision, Quantization, TrainingSpec
from finery_trainer.engine.layers import replace_layers

_LEAST_SHARE = 0.5
"""Of a model's weights, without embeddings and head, that quantization must reach to be worth its name."""

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


def load(spec: TrainingSpec, base_dir: Path, *, device: torch.device | None = None) -> PeftModel | PreTrainedModel:
    """What `spec` trains of the base model in `base_dir`, on `device` (default: the GPU where there is one).

    Method full: the model itself, every parameter of it trained. Otherwise a PeftModel, its base frozen, with fresh adapters seeded by
    `spec.seed`: float32 beside 16-bit and quantized weights. See `load_base` for what is quantized. Decoder layers are replaced where
    the engine has its own (`layers.bind_layers` puts them to use under other drivers than the engine's loop).

    Raises FailedPreconditionError where the folder holds no causal language model or a package for quantized weights is missing,
    InvalidArgumentError where a target module is not in the model.
    """
    from peft import get_peft_model

    device = device or default_device()
    base = load_base(base_dir, dtype=dtype_of(spec.precision, device), quantization=spec.quantization, device=device)
    base.config.use_cache = False
    replace_layers(base)
    if spec.method is MethodType.FULL:
        base.requires_grad_(True)
        model = base
    else:
        torch.manual_seed(spec.seed)
        model = get_peft_model(base, lora_config(spec.lora, base))
    if device.type == "cuda" and base.supports_gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_base(
    base_dir: Path, *, dtype: torch.dtype, quantization: Quantization = Quantization.NONE, device: torch.device
) -> PreTrainedModel:
    """The causal language model in `base_dir` on `device`, without adapters.

    Quantized are all linear layers but the head: bitsandbytes' Linear4bit (NF4, blocks of 64, double quantization) or Linear8bitLt.
    Embeddings, head, norms and biases have `dtype`, and so has what is computed with 4-bit weights. The shares of memory that a
    checkpoint's tied weights take are taken once.

    Raises FailedPreconditionError: there is no such model, weights are missing or of other shapes or quantized otherwise, or bitsandbytes
    is missing.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = None if _is_quantized(base_dir) else _quantization_config(quantization, dtype=dtype)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            base_dir,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": device},
            output_loading_info=True,
            # `_check_files` names them.
            ignore_mismatched_sizes=True,
            **({} if config is None else {"quantization_config": config}),
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise _unusable(f"holds no causal language model with safetensors weights that can be loaded: {error}") from error
    base, found = cast("tuple[PreTrainedModel, Mapping[str, Any]]", loaded)
    _check_files(base, found)
    _check_quantized(base, quantization)
    if quantization is Quantization.NF4:
        _settle_nf4(base, dtype=dtype)
    return base


def _is_quantized(base_dir: Path) -> bool:
    """Whether the files say how they are quantized; transformers then warns of any other word on it."""
    try:
        return bool(json.loads((base_dir / "config.json").read_text()).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False


def _check_files(base: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raises where transformers would train on weights of its own making: those that the files lack, or have in another shape."""
    if missing := sorted(found["missing_keys"]):
        raise _unusable(f"lacks {len(missing)} of the weights that its config.json speaks of, such as {missing[0]}; fetch the model again")
    for name, got, wanted in [*sorted(found["mismatched_keys"]), *_other_shapes(base)]:
        raise _unusable(f"has {name} of shape {tuple(got)}, wanted {tuple(wanted)} by its config.json; fetch the model again")


def _other_shapes(base: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, shape, wanted) of matrices whose module speaks of another shape: transformers does not look while it quantizes."""
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            wanted = module.out_features, module.in_features
        elif isinstance(module, torch.nn.Embedding):
            wanted = module.num_embeddings, module.embedding_dim
        else:
            continue
        got = tuple(getattr(module.weight, "quant_state", module.weight).shape)
        if got != wanted:
            yield f"{name}.weight", got, wanted


def _check_quantized(base: PreTrainedModel, quantization: Quantization) -> None:
    """Raises where files are quantized in another way than the spec says."""
    is_4bit, is_8bit = (bool(getattr(base, f"is_loaded_in_{bits}bit", False)) for bits in (4, 8))
    stored = "int8" if is_8bit else None
    if is_4bit:
        stored = str(cast("Any", base.config).quantization_config.bnb_4bit_quant_type)
    if (stored or "none") != quantization.value:
        raise FailedPreconditionError(
            f"quantization: got {quantization.value}, but the base model's files are quantized as {stored}; "
            "use a base model of 16 or 32 bits, or the quantization that its files have.",
            param="spec.quantization",
        )
    if quantization is not Quantization.NONE and (share := _quantized_share(base)) < _LEAST_SHARE:
        raise FailedPreconditionError(
            f"quantization: got {quantization.value}, which is for linear layers, and only {share:.0%} of this model's weights without "
            "embeddings and head are in such (experts and some families' own layers are not); use none.",
            param="spec.quantization",
        )


def _quantized_share(base: PreTrainedModel) -> float:
    """Of the weights that are neither embeddings nor head, how many are in quantized layers."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    quantized = sum(m.in_features * m.out_features for m in base.modules() if isinstance(m, Linear4bit | Linear8bitLt))
    ends = {id(end.weight) for end in (base.get_input_embeddings(), base.get_output_embeddings()) if isinstance(end, torch.nn.Module)}
    others = sum(p.numel() for p in base.parameters() if id(p) not in ends and p.is_floating_point() and p.dim() > 1)
    return quantized / max(1, quantized + others)


def _unusable(what: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"The base model's folder {what}.", code="invalid_base_model")


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision_of(precision: Precision, device: torch.device | None = None) -> Precision:
    """What `precision` is on `device`, the default one if None: auto is bfloat16 on a GPU and float32 on a CPU."""
    if precision is not Precision.AUTO:
        return precision
    return Precision.FLOAT32 if (device or default_device()).type == "cpu" else Precision.BFLOAT16


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """The element type of weights and arithmetic."""
    precision = precision_of(precision, device)
    return {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16, Precision.FLOAT32: torch.float32}[precision]


def lora_config(spec: LoraSpec, base: torch.nn.Module) -> LoraConfig:
    """PEFT's configuration for `spec`. Raises InvalidArgumentError for a target module that `base` lacks."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    linears = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    targets = [module for name, module in linears.items() if _is_meant(name, spec.target_modules)]
    for target in spec.target_modules:
        if not any(_is_meant(name, [target]) for name in linears):
            known = ", ".join(sorted({re.sub(r".*\.", "", name) for name in linears}))
            raise InvalidArgumentError(
                f"lora.target_modules: got {target!r}, which is no linear layer of this model; it has {known}.", param="lora.target_modules"
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by the rank, fractions included
        lora_dropout=spec.dropout,
        bias=spec.bias.value,
        target_modules=list(spec.target_modules),
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets),
    )


def _is_meant(name: str, targets: Sequence[str]) -> bool:
    """Whether PEFT takes the module `name` for one of `targets`."""
    return any(name == target or name.endswith("." + target) for target in targets)


def _quantization_config(quantization: Quantization, *, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization is Quantization.NONE:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils.import_utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise FailedPreconditionError(
            f"quantization: {quantization.value} needs the package bitsandbytes; install it or use none.", param="quantization"
        )
    if quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def _settle_nf4(base: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Products in `dtype`, whatever quantized files say; and weights that stay as they are.

    On some CPUs bitsandbytes repacks a weight for its own product the first time it is used; others read it too.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
