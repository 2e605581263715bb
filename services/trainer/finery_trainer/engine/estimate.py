"""What a run needs of a GPU, before anything is loaded: bytes by part, from the spec and the base model's `config.json`.

Owns the counting of parameters and what is kept of each kind. Where the engine's own layers train the model, activations and workspace are
the planner's for that memory; for other models, what a pass takes that keeps each layer's input and recomputes the rest.

Shapes: D hidden size, F intermediate size, N outputs of a linear layer, K its inputs, R ranks of its adapters, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from finery_common.spec import LoraBias, LoraSpec, MethodType, OptimizerType, Quantization, TrainingSpec
from finery_kernels.adamw.state import GROUP_BLOCK, QUANTIZATION_BLOCK
from finery_kernels.lora import StackedLayout
from finery_trainer.engine import configs
from finery_trainer.engine.architecture import ModelShape, decoder_of, describe
from finery_trainer.engine.generic import without_budget
from finery_trainer.engine.host_embedding import GENERIC, TIED, not_offloaded
from finery_trainer.engine.model import dtype_of
from finery_trainer.engine.passes import RESERVE_BYTES, is_capturable, most_tokens
from finery_trainer.engine.planner import Plan, Ranks, Workload, plan_step
from finery_trainer.engine.weights import PROJECTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FLOAT32_BYTES = 4
HEAD_TILE_ROWS = 1024
"""Rows whose logits are there at one time."""
_DPO_TILE = (4096, 32768)
"""Rows and vocabulary of TRL's tiles of logits."""
_NF4_BLOCK, _NESTED_BLOCK = 64, 256
_PRECISION_BYTES = 8 << 20
"""To which the least memory of a plan is found, or to a 128th."""
_ANY_CAPABILITY = (8, 0)
"""Of a GPU; whether passes can be captured does not depend on which one from here on."""
_LIBRARIES_BYTES = 64 << 20
"""Workspace of cuBLAS and cuDNN."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one run on each of its GPUs, and on the host."""

    weights_bytes: int
    adapters_bytes: int
    """Their float32 values, and beside 16-bit weights the copies that the engine's own layers multiply with."""
    gradients_bytes: int
    optimizer_states_bytes: int
    activations_bytes: int
    workspace_bytes: int
    host_bytes: int
    """The host's memory, of all GPUs together: what is pinned, and embeddings; no part of the total."""

    @property
    def total_bytes(self) -> int:
        """Allocated on the GPU, of which a run leaves `RESERVE_BYTES` free besides."""
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
    matrices: tuple[int, ...]
    """Elements of each tensor of the base model with two dimensions or more."""
    vectors: tuple[int, ...]
    """Elements of each of the others."""


def estimate(spec: TrainingSpec, config: Mapping[str, Any], *, device_memory_bytes: int, host_bytes: int = 0) -> Estimate:
    """What a run of `spec` needs. `config` is the base model's `config.json`.

    `device_memory_bytes` is what the GPU has free for the run, of which `spec.memory.budget` says how much it may take; with 0, and where
    that is too little, the answer is the least that the run gets by with. `host_bytes` of the host's memory may
    be pinned (`passes.host_bytes`), of all GPUs together.
    Raises FailedPreconditionError where the configuration is of no causal language model, its embeddings cannot be offloaded or its budget
    cannot be kept, InvalidArgumentError where a target module is not in it.
    """
    assert min(device_memory_bytes, host_bytes) >= 0
    whole = configs.read(config)
    read, model = whole.get_text_config(decoder=True), _without_memory(whole)
    parameters = count_parameters(spec, model)
    shape = describe(whole) if _is_plain(spec, model) else "not plain"
    if isinstance(shape, str):
        if spec.memory.offload_embeddings:
            raise not_offloaded(GENERIC)
        if spec.memory.budget != "auto":
            raise without_budget(spec)
        return replace(
            _kept(spec, parameters),
            activations_bytes=activation_bytes(spec, read, num_tokens=_num_tokens(spec)),
            workspace_bytes=_workspace_bytes(spec, read, parameters),
        )
    if spec.memory.offload_embeddings and shape.is_tied:
        raise not_offloaded(TIED)
    work = _workload(spec, model)
    kept = _kept(spec, parameters, copies_bytes=_copies_bytes(spec, shape, work.ranks))
    card_bytes = allocatable_bytes(spec, device_memory_bytes) - kept.total_bytes
    plan = _plan(spec, shape, work, card_bytes=card_bytes, host_bytes=host_bytes // spec.gpus)
    return replace(
        kept,
        activations_bytes=plan.activation_bytes,
        workspace_bytes=plan.workspace_bytes + plan.resident_bytes,
        host_bytes=spec.gpus * (kept.host_bytes + plan.host_bytes),
    )


def allocatable_bytes(spec: TrainingSpec, device_memory_bytes: int) -> int:
    """What a run of `spec` may take of a GPU that has `device_memory_bytes` free."""
    return spec.memory.budget_bytes(max(0, device_memory_bytes - RESERVE_BYTES))


def _kept(spec: TrainingSpec, parameters: Parameters, *, copies_bytes: int = 0) -> Estimate:
    """What stays from step to step."""
    is_full = spec.method is MethodType.FULL
    moved_bytes = _element_bytes(spec) * parameters.embeddings if spec.memory.offload_embeddings else 0
    in_place = parameters.matrices if is_full else ()
    flat = [ceil(size / GROUP_BLOCK) * GROUP_BLOCK for size in (parameters.vectors if is_full else parameters.adapter_tensors)]
    return Estimate(
        weights_bytes=weight_bytes(spec, parameters) - moved_bytes,
        adapters_bytes=0 if is_full else FLOAT32_BYTES * sum(flat) + copies_bytes,
        gradients_bytes=_element_bytes(spec) * sum(in_place) + FLOAT32_BYTES * sum(flat),
        optimizer_states_bytes=sum(state_bytes(size, spec.optimizer.type) for size in (*in_place, *flat)),
        activations_bytes=0,
        workspace_bytes=0,
        host_bytes=moved_bytes,
    )


def _is_plain(spec: TrainingSpec, model: PreTrainedModel) -> bool:
    """Whether the engine's own layers train what `spec` asks for, in a model of their families."""
    lora = spec.lora
    trains_biases = lora.bias is not LoraBias.NONE and any(name.endswith("bias") for name, _ in model.named_parameters())
    has_plain_adapter = lora.dropout == 0 and not trains_biases and not lora.use_dora and "lm_head" not in lora.target_modules
    return spec.method is not MethodType.DPO and spec.quantization is not Quantization.INT8 and has_plain_adapter


def _workload(spec: TrainingSpec, model: PreTrainedModel) -> Workload:
    """One step of the longest rows that the spec allows, on one of its GPUs."""
    rows = [spec.max_sequence_length] * (spec.batch.micro_batch_size * spec.batch.gradient_accumulation_steps)
    return Workload(
        num_tokens=most_tokens(rows, num_replicas=spec.gpus),
        longest_row=spec.max_sequence_length,
        mean_row=spec.max_sequence_length,
        ranks=Ranks() if spec.method is MethodType.FULL else _ranks(spec.lora, model),
        element_bytes=_element_bytes(spec),
        is_quantized=spec.quantization is Quantization.NF4,
        trains_weights=spec.method is MethodType.FULL,
    )


def _ranks(lora: LoraSpec, model: PreTrainedModel) -> Ranks:
    """Of the first layer's projections, as `weights` stacks them."""
    layer = cast("nn.ModuleList", decoder_of(model).layers)[0]
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, int] = {}
    for projection, (block_name, members) in PROJECTIONS.items():
        block = cast("nn.Module", getattr(layer, block_name))
        linears = [cast("nn.Linear", getattr(block, name)) for name in members if hasattr(block, name)]
        linears = linears or [cast("nn.Linear", getattr(block, f"{projection}_proj"))]
        ranks = tuple(lora.rank if any(_is_meant(names[linear], target) for target in lora.target_modules) else 0 for linear in linears)
        found[projection] = StackedLayout(linears[0].in_features, tuple(linear.out_features for linear in linears), ranks).num_ranks
    return Ranks(**found)


def _copies_bytes(spec: TrainingSpec, shape: ModelShape, ranks: Ranks) -> int:
    """What adapters add to weights that stay in the arithmetic's precision: R rows and R columns."""
    if spec.quantization is not Quantization.NONE:
        return 0
    elements = 0
    for layer in shape.layers:
        sizes = (
            (ranks.qkv, layer.num_qkv, layer.hidden),
            (ranks.o, layer.hidden, layer.num_attention),
            (ranks.gate_up, 2 * layer.intermediate, layer.hidden),
            (ranks.down, layer.hidden, layer.intermediate),
        )
        elements += sum(rank * (rank + outputs + inputs) for rank, outputs, inputs in sizes)
    return _element_bytes(spec) * elements


def _plan(spec: TrainingSpec, shape: ModelShape, work: Workload, *, card_bytes: int, host_bytes: int) -> Plan:
    """The run's plan for `card_bytes`, or the one for the least that there is a plan for."""

    def planned(room: int) -> Plan | None:
        try:
            return plan_step(
                shape,
                work,
                card_bytes=room,
                host_bytes=host_bytes,
                pack_tokens=spec.batch.max_tokens,
                is_capturable=is_capturable(
                    shape, capability=_ANY_CAPABILITY, dtype=_dtype(spec), is_deterministic=spec.deterministic is True
                ),
            )
        except ResourceExhaustedError:
            return None

    if card_bytes > 0 and (plan := planned(card_bytes)) is not None:
        return plan
    too_little, enough = max(0, card_bytes), 2 * max(card_bytes, _PRECISION_BYTES)
    while (least := planned(enough)) is None:
        too_little, enough = enough, 2 * enough
    while enough - too_little > max(_PRECISION_BYTES, enough // 128):
        middle = (too_little + enough) // 2
        if (plan := planned(middle)) is None:
            too_little = middle
        else:
            least, enough = plan, plan.card_bytes
    return least


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
    """AdamW's two moments of one buffer. In 8 bits each block of 256 has a float32 scale."""
    if optimizer is OptimizerType.ADAMW_BF16:
        return 2 * 2 * num_elements
    if optimizer is OptimizerType.ADAMW:
        return 2 * FLOAT32_BYTES * num_elements
    return 2 * (num_elements + FLOAT32_BYTES * ceil(num_elements / QUANTIZATION_BLOCK))


def activation_bytes(spec: TrainingSpec, config: PretrainedConfig, *, num_tokens: int) -> int:
    """Activations of a forward and backward pass over `num_tokens` that keeps each layer's input and recomputes the rest.

    The last addend is what one layer holds while it is recomputed: the stream and its gradient, q, k, v and the attention's output with
    theirs, and gate, up and their product with theirs.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # State-space models have no heads, but an inner stream, which they call intermediate.
    num_heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None) or hidden // max(1, num_heads)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    num_qkv = (num_heads + 2 * num_kv_heads) * head_dim
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    one_layer = 4 * hidden + 2 * (num_qkv + num_heads * head_dim) + 6 * intermediate
    return _element_bytes(spec) * num_tokens * (layers * hidden + one_layer)


def count_parameters(spec: TrainingSpec, model: PreTrainedModel) -> Parameters:
    """Numbers of parameters of a model that has shapes and no memory."""
    head = model.get_output_embeddings()
    linears = [sizes for _, module, sizes in linears_of(model) if module is not head]
    tensors = list(model.parameters())
    num_weights = sum(outputs * inputs for outputs, inputs in linears)
    embedding = cast("nn.Embedding", model.get_input_embeddings()).weight
    is_tied = isinstance(head, nn.Linear) and head.weight is embedding
    return Parameters(
        linears=tuple(linears),
        others=sum(tensor.numel() for tensor in tensors) - num_weights,
        embeddings=0 if is_tied else embedding.numel(),
        adapter_tensors=() if spec.method is MethodType.FULL else tuple(_adapter_tensors(model, spec.lora)),
        matrices=tuple(tensor.numel() for tensor in tensors if tensor.dim() > 1),
        vectors=tuple(tensor.numel() for tensor in tensors if tensor.dim() <= 1),
    )


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    """(name, module, (N, K)) of all linear layers, GPT-2's transposed ones included."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            yield name, module, (outputs, inputs)


def _adapter_tensors(model: nn.Module, lora: LoraSpec) -> Iterator[int]:
    linears = list(linears_of(model))
    for target in lora.target_modules:
        if not any(_is_meant(name, target) for name, _, _ in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name, _, _ in linears}))
            raise InvalidArgumentError(
                f"lora.target_modules: got {target!r}, which is no linear layer of this model; it has {known}.", param="lora.target_modules"
            )
    for name, module, (outputs, inputs) in linears:
        if any(_is_meant(name, target) for target in lora.target_modules):
            yield lora.rank * inputs
            yield lora.rank * outputs
            if lora.use_dora:
                yield outputs
            bias = cast("nn.Parameter | None", module.bias)
            if lora.bias is LoraBias.LORA_ONLY and bias is not None:
                yield bias.numel()
    if lora.bias is LoraBias.ALL:
        yield from (parameter.numel() for name, parameter in model.named_parameters() if name.endswith("bias"))


def _is_meant(name: str, target: str) -> bool:
    """Whether PEFT takes the module `name` for the target module `target`."""
    return name == target or name.endswith("." + target)


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
    """Of a weight that is not quantized, and of an activation."""
    return _dtype(spec).itemsize


def _dtype(spec: TrainingSpec) -> torch.dtype:
    return dtype_of(spec.precision, torch.device("cuda"))


def _without_memory(config: PretrainedConfig) -> PreTrainedModel:
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
