"""Any causal language model of transformers as the engine's loop drives it: its own modules, autograd, padded micro-batches.

    passes = GenericPasses(model, spec)
    loss = passes.gradients(rows)              # summed over labels / the step's labels; gradients are added

The counterpart of `passes.PackedPasses` and `stack.TrainingStack` for models that these do not take, with the same names. Owns which rows
share a micro-batch and its loss: where logits are nothing but hidden states times one matrix, scaled or softly capped, they are
computed in tiles, in float32, for labelled tokens alone; whether they are is not taken from a list of families but tried on a few tokens.

Shapes: B rows, T tokens of the longest, L labelled tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import Quantization, TrainingSpec
from finery_kernels.linear_cross_entropy import linear_cross_entropy
from finery_kernels.nf4 import Nf4State, dequantize
from finery_trainer.engine.architecture import base_of
from finery_trainer.engine.determinism import deterministic_operations
from finery_trainer.engine.host_embedding import GENERIC, not_offloaded
from finery_trainer.engine.loss_scale import loss_scale_of
from finery_trainer.engine.model import checkpoint_layers
from finery_trainer.engine.optim import Stepper, build_flat_optimizer, rate_factors
from finery_trainer.engine.packing import IGNORE, Row, count_labels
from finery_trainer.engine.trained import FlatGroup, flatten, in_place

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from finery_trainer.engine.data import Samples

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Names under which configurations keep a factor of the logits, or its inverse."""
_NUM_PROBED = 8


@dataclass(frozen=True, kw_only=True)
class PlainHead:
    """Logits = cap(scale * hidden @ weight.T), where cap(x) = softcap * tanh(x / softcap)."""

    linear: nn.Linear
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """In float32, of hidden states [..., D]."""
        logits = nn.functional.linear(hidden, self.linear.weight).float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def summed_loss(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over labels; a float32 scalar."""
        weight_VD = self.linear.weight
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1).to(weight_VD.dtype),
            weight_VD,
            targets_BT.flatten(),
            softcap=self.softcap,
            scale=self.scale,
            reduction="sum",
            ignore_index=IGNORE,
        )


class GenericPasses:
    """Passes of a model's own modules over padded micro-batches of `spec.batch`; see `passes.Passes`.

    Raises FailedPreconditionError for what `spec` asks of the engine's own layers alone, and for weights that are not read right.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, spec: TrainingSpec) -> None:
        if spec.memory.offload_embeddings:
            raise not_offloaded(GENERIC)
        if spec.memory.budget != "auto":
            raise without_budget(spec)
        check_quantization(model)
        self._model, self._spec = model, spec
        self._device = base_of(model).device
        with deterministic_operations(spec, self._device), _explained(spec):
            self.stack = GenericStack(model)

    def stepper(self, num_steps: int) -> Stepper:
        """The optimizer of what is trained."""
        factors, loss_scale = rate_factors(self._model, self._spec), self.stack.loss_scale
        return build_flat_optimizer(self._spec.optimizer, self.stack.groups, num_steps, factors=factors, loss_scale=loss_scale)

    def prepare(self, rows: Sequence[Row]) -> None:
        """Nothing to get ready."""

    def gradients(self, rows: Sequence[Row]) -> torch.Tensor:
        """Adds the gradients of the mean loss over the labels of `rows`, and answers it: float32, 0-dim, on the device.

        However the same rows are split into micro-batches, loss and gradient are the same up to rounding.
        """
        num_labels = count_labels(rows)
        if not num_labels:
            raise InvalidArgumentError(
                f"targets: got {len(rows)} rows and no token that the loss is taken on, wanted at least 1 in a step; check the labels."
            )
        with deterministic_operations(self._spec, self._device):
            parts = self._micro_batches([len(ids) for ids, _ in rows])
            losses = [self.stack.forward_backward([rows[row] for row in part], num_labels=num_labels) for part in parts]
            return torch.stack(losses).sum()

    def mean_loss(self, data: Samples[Row]) -> float:
        """The loss over all labels of `data`, without dropout."""
        losses, num_labels = list[torch.Tensor](), 0
        with deterministic_operations(self._spec, self._device):
            for part in self._micro_batches([int(length) for length in data.row_lengths]):
                rows = [data.training_row(row) for row in part]
                losses.append(self.stack.loss(rows))
                num_labels += count_labels(rows)
            return float(torch.stack(losses).double().sum()) / num_labels

    def refresh(self) -> None:
        """Takes over new values of the trained parameters."""
        self.stack.refresh()

    def _micro_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices into `lengths`, neighbours in length together so that little is padding; `spec.batch.max_tokens` counts that too."""
        batch, part = self._spec.batch, list[int]()
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            is_over = part and batch.max_tokens is not None and (len(part) + 1) * lengths[part[0]] > batch.max_tokens
            if is_over or len(part) == batch.micro_batch_size:
                yield part
                part = []
            part.append(index)
        if part:
            yield part


class GenericStack:
    """A model, its own `forward`, and flat buffers of what is trained.

    `is_checkpointed` switches the model's gradient checkpointing, layer by layer, on or off; None leaves it as it is. A model that has none
    stays without.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, *, is_checkpointed: bool | None = None) -> None:
        self._model, self._base = model, base_of(model)
        self.dtype, self.device = self._base.dtype, self._base.device
        if is_checkpointed is not None:
            _checkpoint(self._base, wanted=is_checkpointed)
        self.groups: list[FlatGroup] = _flat_groups(model)
        self.loss_scale = loss_scale_of(self.dtype, self.device)
        """By which gradients are multiplied, where their type wants it."""
        self._gradients: dict[int, torch.Tensor] = {}
        for group in self.groups:
            for index, (parameter, _) in enumerate(group.members):
                self._gradients[id(parameter)] = group.grad_of(index)
        self.head = find_plain_head(model)
        """What logits are computed with in tiles; None where the model's `forward` computes them all."""

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Where the gradient of a trained parameter is added, in its shape."""
        return self._gradients[id(parameter)]

    def refresh(self) -> None:
        """Takes over what others have written to the trained parameters: they are read where they stand."""

    def zero_grad(self) -> None:
        """Gradients to zero; whoever has taken `grad` off a parameter sees it again."""
        for group in self.groups:
            group.grads_N.zero_()
            for index, (parameter, _) in enumerate(group.members):
                parameter.grad = group.grad_of(index) if group.grads_N.dtype == parameter.dtype else None

    def forward_backward(self, rows: Sequence[Row], *, num_labels: int | torch.Tensor) -> torch.Tensor:
        """Adds the gradients of (summed cross-entropy / `num_labels`) and answers that loss, a float32 scalar on the device.

        The gradients are multiplied by `loss_scale`. `rows` go through the model as one padded micro-batch. `num_labels` is the whole
        optimizer step's, so that it may be split into any.
        """
        loss = self._summed_loss(rows) / num_labels
        if loss.requires_grad:
            (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()
        self._collect_gradients()
        return loss.detach()

    def _collect_gradients(self) -> None:
        """Adds 16-bit gradients to their float32 sums; the others are where they belong."""
        for group in self.groups:
            if group.grads_N.dtype != group.values_N.dtype:
                for index, (parameter, _) in enumerate(group.members):
                    if parameter.grad is not None:
                        group.grad_of(index).add_(parameter.grad)
                        parameter.grad = None

    @torch.no_grad()
    def loss(self, rows: Sequence[Row]) -> torch.Tensor:
        """Cross-entropy summed over the rows' labels without dropout, a float32 scalar on the device."""
        with _evaluating(self._model):
            return self._summed_loss(rows)

    def _summed_loss(self, rows: Sequence[Row]) -> torch.Tensor:
        """There is no attention mask: padding stands to the right of every label, where a causal model does not look."""
        input_ids_BT, targets_BT = (torch.from_numpy(part).to(self.device) for part in padded(rows))
        if not any((targets != IGNORE).any() for _, targets in rows):
            return torch.zeros((), device=self.device)
        if self.head is None:
            return self._loss_of_logits(input_ids_BT, targets_BT)
        with _precision(self._base):
            hidden_BTD = _hidden_states(self._base, input_ids_BT)
        assert hidden_BTD is not None
        return self.head.summed_loss(hidden_BTD, targets_BT)

    def _loss_of_logits(self, input_ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """By the model's own logits, of those positions that some row has a label at."""
        positions_P = (targets_BT != IGNORE).any(dim=0).nonzero().squeeze(1)
        with _precision(self._base):
            if "logits_to_keep" in inspect.signature(self._base.forward).parameters:
                logits_BPV = self._model(input_ids=input_ids_BT, use_cache=False, logits_to_keep=positions_P).logits
            else:
                logits_BPV = self._model(input_ids=input_ids_BT, use_cache=False).logits[:, positions_P]
        is_label_BP = targets_BT[:, positions_P] != IGNORE
        logits_LV = logits_BPV[is_label_BP].float() if logits_BPV.dtype != torch.float64 else logits_BPV[is_label_BP]
        return nn.functional.cross_entropy(logits_LV, targets_BT[:, positions_P][is_label_BP], reduction="sum")


def without_budget(spec: TrainingSpec) -> FailedPreconditionError:
    """The error of a run that is to keep to a budget, which transformers' own modules can not."""
    return FailedPreconditionError(
        f"memory.budget: got {spec.memory.budget}, but the model trains by transformers' own modules, whose memory is not planned; "
        "leave it out, and lower batch.micro_batch_size or batch.max_tokens where memory is short.",
        param="spec.memory.budget",
    )


@contextlib.contextmanager
def _explained(spec: TrainingSpec) -> Iterator[None]:
    """A model's first tokens: where it computes with weights past their layers, as Mamba does, quantized ones fail it in torch."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if spec.quantization is Quantization.NONE:
            raise
        raise FailedPreconditionError(
            f"quantization: got {spec.quantization.value}, but this model cannot compute with quantized weights ({error}); use none.",
            param="spec.quantization",
        ) from error


def check_quantization(model: PeftModel | PreTrainedModel) -> None:
    """Raises FailedPreconditionError for 4-bit weights that bitsandbytes, which computes with them here, reads as other numbers.

    On a CPU it does so where rows end inside a block of scales.
    """
    for name, module in base_of(model).named_modules():
        if not _is_read_right(module):
            weight, state = cast("torch.Tensor", module.weight), cast("Any", module.weight).quant_state
            raise FailedPreconditionError(
                f"quantization: got nf4, but {name} has {state.shape[-1]} inputs, no multiple of {state.blocksize}, and on a "
                f"{weight.device.type.upper()} bitsandbytes reads such weights wrongly; use none or int8.",
                param="spec.quantization",
            )


def _is_read_right(module: nn.Module) -> bool:
    """Whether a 4-bit weight, where `module` has one, is what bitsandbytes takes it for."""
    state = cast("Any", getattr(getattr(module, "weight", None), "quant_state", None))
    if state is None or state.shape[-1] % state.blocksize == 0:
        return True
    from bitsandbytes.functional import dequantize_4bit

    packed = cast("torch.Tensor", module.weight).data
    theirs_NK = dequantize_4bit(packed, state)
    ours_NK = dequantize(packed, Nf4State.from_bitsandbytes(state), dtype=theirs_NK.dtype)
    return torch.equal(ours_NK.flatten(), theirs_NK.flatten())


def padded(rows: Sequence[Row]) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], np.ndarray[tuple[int, int], np.dtype[np.int64]]]:
    """(token ids, targets) [B, T], padded on the right with 0 and IGNORE."""
    width = max(len(ids) for ids, _ in rows)
    input_ids_BT = np.zeros((len(rows), width), dtype=np.int64)
    targets_BT = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for position, (ids, targets) in enumerate(rows):
        input_ids_BT[position, : len(ids)], targets_BT[position, : len(ids)] = ids, targets
    return input_ids_BT, targets_BT


@torch.no_grad()
def find_plain_head(model: PeftModel | PreTrainedModel) -> PlainHead | None:
    """How the model makes logits of its decoder's hidden states, or None where it does that by more than a plain head.

    That the model does so is seen on a few tokens; an adapter or a bias on the head rules it out.
    """
    base = base_of(model)
    linear = base.get_output_embeddings()
    if type(linear) is not nn.Linear or cast("object", linear.bias) is not None or base.get_decoder() is base:
        return None
    input_ids_BT = torch.arange(_NUM_PROBED, device=base.device)[None] % linear.out_features
    with _evaluating(model), _precision(base):
        wanted = base(input_ids=input_ids_BT, use_cache=False).logits.float()
        hidden_BTD = _hidden_states(base, input_ids_BT)
    if hidden_BTD is None or hidden_BTD.shape[-1] != linear.in_features:
        return None
    config = base.config.get_text_config()
    softcap = cast("float | None", getattr(config, "final_logit_softcapping", None))
    for scale in _scales(config):
        head = PlainHead(linear=linear, scale=scale, softcap=softcap)
        # The error of rounding logits, which the tiles do not have; a wrong form is off by far more.
        budget = 4 * torch.finfo(wanted.dtype if base.dtype.itemsize > 2 else base.dtype).eps
        if (head.logits(hidden_BTD.to(linear.weight.dtype)) - wanted).norm() <= budget * wanted.norm():
            return head
    return None


def _scales(config: PretrainedConfig) -> Iterator[float]:
    """Factors of the logits that a configuration may mean."""
    values = [float(value) for name in _SCALES if isinstance(value := getattr(config, name, None), int | float) and value]
    yield from (factor for value in values for factor in (value, 1 / value))
    yield 1.0


def _hidden_states(base: PreTrainedModel, input_ids_BT: torch.Tensor) -> torch.Tensor | None:
    """What a head is given [B, T, D], where the decoder answers that."""
    return getattr(base.get_decoder()(input_ids=input_ids_BT, use_cache=False), "last_hidden_state", None)


def _flat_groups(model: nn.Module) -> list[FlatGroup]:
    """What is trained: base weights where they stand, adapters and vectors moved behind each other, by type."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    stays = {name for name, p in trained.items() if p.dim() > 1 and "lora_" not in name and p.is_contiguous()}
    groups = [in_place(parameter.data, [parameter]) for name, parameter in trained.items() if name in stays]
    moved = [parameter for name, parameter in trained.items() if name not in stays]
    by_type = [[p for p in moved if p.dtype == dtype] for dtype in sorted({p.dtype for p in moved}, key=str)]
    return [*map(flatten, by_type), *groups]


def _checkpoint(base: PreTrainedModel, *, wanted: bool) -> None:
    if not wanted:
        base.gradient_checkpointing_disable()
    elif base.supports_gradient_checkpointing:
        checkpoint_layers(base)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _precision(base: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Adapters are float32 even on 16-bit weights; autocast makes their products 16-bit, as the rest."""
    if base.dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)
