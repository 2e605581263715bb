"""What a run needs of a GPU, before anything is loaded: bytes by part, from the spec and the base model's `config.json`.

Owns the counting of parameters and what is kept of each kind. Activations and workspace are what a run gets by with when it recomputes
all it can; what it keeps beyond that, in memory to spare, is the planner's.

Shapes: D hidden size, F intermediate size, N outputs of a linear layer, K its inputs, V vocabulary, T tokens of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import LoraBias, LoraSpec, MethodType, OptimizerType, Precision, Quantization, TrainingSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT32_BYTES = 4
HEAD_TILE_ROWS = 1024
"""Rows whose logits are there at one time."""
_DPO_TILE = (4096, 32768)
"""Rows and vocabulary of TRL's tiles of logits."""
_NF4_BLOCK, _NESTED_BLOCK, _STATE_BLOCK = 64, 256, 256
_STATE_MIN_ELEMENTS = 4096
_LIBRARIES_BYTES = 64 << 20
"""Workspace of cuBLAS and cuDNN."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one run on one GPU, and in pinned host memory."""

    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_states_bytes: int
    activations_bytes: int
    workspace_bytes: int
    host_bytes: int
    """Pinned host memory; no part of the total."""

    @property
    def total_bytes(self) -> int:
        """Of the GPU's memory."""
        return (
            self.weights_bytes
            + self.adapters_bytes
            + self.gradients_bytes
            + self.optimizer_states_bytes
            + self.activations_bytes
            + self.workspace_bytes
        )


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of elements. `linears` are the decoder's linear layers as (N, K); `others` embeddings, head, norms and biases."""

    linears: tuple[tuple[int, int], ...]
    others: int
    embeddings: int
    """Of `others`, the input embeddings where they are not the head as well."""
    adapter_tensors: tuple[int, ...]
    """Elements of each tensor that an adapter trains."""
    all_tensors: tuple[int, ...]
    """Elements of each tensor of the base model."""


def estimate(spec: TrainingSpec, config: Mapping[str, Any], *, device_memory_bytes: int) -> Estimate:
    """What a run of `spec` needs. `config` is the base model's `config.json`.

    `device_memory_bytes` is what the GPU has free for the run; with 0 the answer is the least that the run gets by with, which is also
    what this version answers whatever the memory.
    Raises FailedPreconditionError where the configuration is of no causal language model, InvalidArgumentError where a target module
    is not in it.
    """
    assert device_memory_bytes >= 0
    read = _read(config)
    parameters = count_parameters(spec, read)
    trained = parameters.all_tensors if spec.method is MethodType.FULL else parameters.adapter_tensors
    gradient_bytes = _element_bytes(spec) if spec.method is MethodType.FULL else FLOAT32_BYTES
    moved = _element_bytes(spec) * parameters.embeddings if spec.memory.offload_embeddings else 0
    return Estimate(
        weights_bytes=weight_bytes(spec, parameters) - moved,
        adapters_bytes=0 if spec.method is MethodType.FULL else FLOAT32_BYTES * sum(parameters.adapter_tensors),
        gradients_bytes=gradient_bytes * sum(trained),
        optimizer_states_bytes=sum(state_bytes(size, spec.optimizer.type) for size in trained),
        activations_bytes=activation_bytes(spec, read, num_tokens=_num_tokens(spec)),
        workspace_bytes=_workspace_bytes(spec, read, parameters),
        host_bytes=moved,
    )


def weight_bytes(spec: TrainingSpec, parameters: Parameters) -> int:
    """The base model's weights on the GPU, quantized as `spec` says.

    NF4 takes half a byte a weight, one byte for the scale of each block of 64, four for the scale of 256 such scales; int8 one byte a
    weight and four an output. Everything but the decoder's linear layers stays in the run's precision.
    """
    rest = _element_bytes(spec) * parameters.others
    num_weights = sum(n * k for n, k in parameters.linears)
    if spec.quantization is Quantization.NONE:
        return rest + _element_bytes(spec) * num_weights
    if spec.quantization is Quantization.INT8:
        return rest + num_weights + FLOAT32_BYTES * sum(n for n, _ in parameters.linears)
    scales = [ceil(n * k / _NF4_BLOCK) for n, k in parameters.linears]
    nested = sum(ceil(count / _NESTED_BLOCK) for count in scales)
    return rest + sum(ceil(n * k / 2) for n, k in parameters.linears) + sum(scales) + FLOAT32_BYTES * nested


def state_bytes(num_elements: int, optimizer: OptimizerType) -> int:
    """AdamW's two moments of one tensor. In 8 bits each block of 256 has a float32 scale, and small tensors stay in float32."""
    if optimizer is OptimizerType.ADAMW_BF16:
        return 2 * 2 * num_elements
    if optimizer is OptimizerType.ADAMW or num_elements < _STATE_MIN_ELEMENTS:
        return 2 * FLOAT32_BYTES * num_elements
    return 2 * (num_elements + FLOAT32_BYTES * ceil(num_elements / _STATE_BLOCK))


def activation_bytes(spec: TrainingSpec, config: PretrainedConfig, *, num_tokens: int) -> int:
    """Activations of a forward and backward pass over `num_tokens` that keeps each layer's input and recomputes the rest.

    The last addend is what one layer holds while it is recomputed: the stream and its gradient, q, k, v and the attention's output with
    theirs, and gate, up and their product with theirs.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    num_qkv = (config.num_attention_heads + 2 * num_kv_heads) * head_dim
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    one_layer = 4 * hidden + 2 * (num_qkv + config.num_attention_heads * head_dim) + 6 * intermediate
    return _element_bytes(spec) * num_tokens * (layers * hidden + one_layer)


def count_parameters(spec: TrainingSpec, config: PretrainedConfig) -> Parameters:
    """Numbers of parameters, from a model of this configuration that has shapes and no memory."""
    model = _without_memory(config)
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    sizes = [parameter.numel() for parameter in model.parameters()]
    num_weights = sum(module.weight.numel() for module in linears.values())
    embedding = cast("nn.Embedding", model.get_input_embeddings()).weight
    is_tied = isinstance(head, nn.Linear) and head.weight is embedding
    return Parameters(
        linears=tuple((module.out_features, module.in_features) for module in linears.values()),
        others=sum(sizes) - num_weights,
        embeddings=0 if is_tied else embedding.numel(),
        adapter_tensors=() if spec.method is MethodType.FULL else tuple(_adapter_tensors(model, spec.lora)),
        all_tensors=tuple(sizes),
    )


def _adapter_tensors(model: nn.Module, lora: LoraSpec) -> Iterator[int]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in lora.target_modules:
        found = [module for name, module in linears.items() if name == target or name.endswith("." + target)]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise InvalidArgumentError(
                f"lora.target_modules: got {target!r}, which is no linear layer of this model; it has {known}.", param="lora.target_modules"
            )
        for module in found:
            yield lora.rank * module.in_features
            yield lora.rank * module.out_features
            if lora.use_dora:
                yield module.out_features
            bias = cast("nn.Parameter | None", module.bias)
            if lora.bias is LoraBias.LORA_ONLY and bias is not None:
                yield bias.numel()
    if lora.bias is LoraBias.ALL:
        yield from (parameter.numel() for name, parameter in model.named_parameters() if name.endswith("bias"))


def _workspace_bytes(spec: TrainingSpec, config: PretrainedConfig, parameters: Parameters) -> int:
    """The libraries' own, the largest weight dequantized, and the logits of a tile in float32 with their gradient in 16 bits; DPO's tiles
    are of part of the vocabulary, in 16 bits alone.
    """
    largest = max((n * k for n, k in parameters.linears), default=0)
    dequantized = 0 if spec.quantization is Quantization.NONE else _element_bytes(spec) * largest
    if spec.method is MethodType.DPO:
        rows, columns = (min(size, limit) for size, limit in zip((_num_tokens(spec), config.vocab_size), _DPO_TILE, strict=True))
        head = rows * columns * _element_bytes(spec)
    else:
        head = min(HEAD_TILE_ROWS, _num_tokens(spec)) * config.vocab_size * (FLOAT32_BYTES + _element_bytes(spec))
    return _LIBRARIES_BYTES + dequantized + head


def _num_tokens(spec: TrainingSpec) -> int:
    """The most tokens of one forward pass; a pair has two rows."""
    rows = spec.batch.micro_batch_size * (2 if spec.method is MethodType.DPO else 1)
    return spec.batch.max_tokens or rows * spec.max_sequence_length


def _element_bytes(spec: TrainingSpec) -> int:
    """Of a weight that is not quantized, and of an activation; on a GPU auto is bfloat16."""
    return FLOAT32_BYTES if spec.precision is Precision.FLOAT32 else 2


def _read(config: Mapping[str, Any]) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        read = AutoConfig.for_model(config["model_type"], **fields)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise _no_language_model(f"its config.json cannot be read: {error}") from error
    return read.get_text_config()


def _without_memory(config: PretrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError) as error:
        raise _no_language_model(f"no causal language model has this configuration: {error}") from error
    model.tie_weights()
    return model


def _no_language_model(reason: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"What this base model needs cannot be told: {reason}", code="invalid_base_model")
