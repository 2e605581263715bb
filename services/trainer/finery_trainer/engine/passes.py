"""Forward and backward passes of optimizer steps, by whichever path trains the model, with memory planned and batches prepared.

    passes = PackedPasses(model, spec, longest_row=…, mean_row=…, num_tokens=…)
    loss = passes.gradients(rows)              # summed over labels / the step's labels; gradients are added
    passes.prepare(next_rows)                  # while the device works

Owns which rows go through the model together, the memory plan of a run, and whether CUDA graphs are used. The model's arithmetic is
`stack`'s, for models that it does not take `generic`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import psutil
import structlog
import torch

from finery_common.errors import FailedPreconditionError
from finery_common.spec import Quantization, TrainingSpec
from finery_kernels.attention import choose_backend
from finery_trainer.engine.generic import GenericPasses
from finery_trainer.engine.graphs import GraphedPasses, in_buckets
from finery_trainer.engine.host_embedding import HostEmbedding
from finery_trainer.engine.optim import Stepper, build_flat_optimizer, rate_factors
from finery_trainer.engine.packing import PackedBatch, Row, count_labels, groups, multiple_of_labels, pack, padded_tokens, replaced
from finery_trainer.engine.planner import Plan, Ranks, Workload, keep_all, plan_step
from finery_trainer.engine.stack import TrainingStack, unsupported

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finery_trainer.engine.architecture import ModelShape
    from finery_trainer.engine.data import Samples, TokenDataset

log = structlog.get_logger(__name__)
SampleT_contra = TypeVar("SampleT_contra", contravariant=True)

_CPU_PACK_TOKENS = 4096
_CONTEXT_BYTES = 1 << 30
"""What CUDA's context takes of a card at the most, where the memory that is free is not asked for."""
_COLLECTIVES_BYTES = 1 << 30
"""What NCCL takes beside it for several GPUs: 850 MiB between two H100s; more GPUs were not measured."""
RESERVE_BYTES = 512 << 20
"""Left free on a GPU: what fragments, and other libraries' workspaces."""


class PackedPasses:
    """Passes of the engine's own layers over packed batches.

    `longest_row`, `mean_row` and `num_tokens` (of a step) describe the data for the plan. Raises FailedPreconditionError for a model that
    the engine's layers do not take or whose embeddings cannot stay on the host, and for a budget of a GPU's memory without one;
    ResourceExhaustedError where `spec.memory` is too little.
    """

    def __init__(
        self, model: PeftModel | PreTrainedModel, spec: TrainingSpec, *, longest_row: int, mean_row: float, num_tokens: int
    ) -> None:
        self._model = model
        self.stack = TrainingStack(model)
        self._device = self.stack.device
        if spec.memory.budget != "auto" and self._device.type != "cuda":
            raise FailedPreconditionError(
                f"memory.budget: got {spec.memory.budget}, which is of a GPU's memory, but this run is on a CPU; leave it out.",
                param="spec.memory.budget",
            )
        is_gpu = self._device.type == "cuda"
        self._is_deterministic = spec.deterministic if spec.deterministic is not None else not is_gpu
        self._longest_row, self._mean_row, self._num_tokens = longest_row, mean_row, num_tokens
        self._max_tokens = _CPU_PACK_TOKENS if spec.batch.max_tokens is None else spec.batch.max_tokens
        self._spec = spec
        self._embedding = HostEmbedding(model) if spec.memory.offload_embeddings else None
        self._graphs: GraphedPasses | None = None
        self._prepared: tuple[list[Row], list[PackedBatch]] | None = None

    @property
    def plan(self) -> Plan:
        """What is kept where."""
        return self.stack.plan

    def plan_memory(self, *, reserved_bytes: int = 0) -> None:
        """Plans the run's memory on a GPU; called when everything else that stays, `reserved_bytes` besides, is allocated."""
        if self._device.type != "cuda":
            self.stack.follow(keep_all(len(self.stack.blocks)))
            return
        card_bytes = _card_bytes(self._spec, self._device, is_fixed=self._is_deterministic) - reserved_bytes
        plan = plan_step(
            self.stack.shape,
            workload(self.stack, self._spec, longest_row=self._longest_row, mean_row=self._mean_row, num_tokens=self._num_tokens),
            card_bytes=card_bytes,
            host_bytes=host_bytes(self._spec),
            pack_tokens=self._spec.batch.max_tokens,
            is_capturable=is_capturable(
                self.stack.shape,
                capability=torch.cuda.get_device_capability(self._device),
                dtype=self.stack.dtype,
                is_deterministic=self._is_deterministic,
            ),
        )
        self._max_tokens = plan.pack_tokens
        self.stack.follow(plan)
        self._graphs = GraphedPasses(self.stack) if plan.is_graphed else None
        log.info(
            "memory planned",
            pack_tokens=plan.pack_tokens,
            card_bytes=plan.card_bytes,
            host_bytes=plan.host_bytes,
            is_graphed=plan.is_graphed,
            step_s=round(plan.step_s, 3),
        )

    def prepare(self, rows: Sequence[Row]) -> None:
        """Builds the batches of these rows, in pinned memory beside a GPU; the next call of `gradients` with the same rows takes them."""
        self._prepared = list(rows), self._batches(rows)

    def gradients(self, rows: Sequence[Row], *, num_labels: int | None = None) -> torch.Tensor:
        """Adds the gradients of the mean loss over the labels of `rows`, and answers it: float32, 0-dim, on the device.

        `num_labels` is what the summed loss is divided by where `rows` are only a part of the step's.
        """
        if self._prepared is None or not _are_same(self._prepared[0], rows):
            self.prepare(rows)
        assert self._prepared is not None
        batches, self._prepared = self._prepared[1], None
        if num_labels is None:
            num_labels = sum(batch.num_labels for batch in batches)
        losses = [self._forward_backward(batch, num_labels) for batch in batches]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def loss(self, rows: Sequence[Row]) -> torch.Tensor:
        """Cross-entropy summed over the labels of `rows`: float32, 0-dim, on the device."""
        return torch.stack([self.stack.loss(batch.to(self._device)) for batch in self._batches(rows)]).sum()

    def mean_loss(self, data: Samples[Row]) -> float:
        """The loss over all labels of `data`."""
        total, num_labels = 0.0, 0
        for members in groups([int(length) for length in data.row_lengths], max_tokens=self._max_tokens):
            rows = [data.training_row(row) for row in members]
            total += self.loss(rows).item()
            num_labels += count_labels(rows)
        return total / num_labels

    def stepper(self, num_steps: int) -> Stepper:
        """The optimizer of what is trained. Memory is planned when it is there."""
        factors, loss_scale = rate_factors(self._model, self._spec), self.stack.loss_scale
        stepper = build_flat_optimizer(self._spec.optimizer, self.stack.groups, num_steps, factors=factors, loss_scale=loss_scale)
        self.plan_memory()
        return stepper

    def refresh(self) -> None:
        """Takes over new values of the trained parameters."""
        self.stack.refresh()

    def _forward_backward(self, batch: PackedBatch, num_labels: int) -> torch.Tensor:
        if self._graphs is None:
            return self.stack.forward_backward(batch.to(self._device), num_labels=num_labels)
        return self._graphs.forward_backward(batch, num_labels=num_labels).clone()

    def _batches(self, rows: Sequence[Row]) -> list[PackedBatch]:
        lengths = [len(ids) for ids, _ in rows]
        return [self._batch([rows[index] for index in members]) for members in groups(lengths, max_tokens=self._max_tokens)]

    def _batch(self, rows: Sequence[Row]) -> PackedBatch:
        if self._device.type != "cuda":
            return self._embedded(pack(rows, is_deterministic=self._is_deterministic))
        num_tokens = sum(len(ids) for ids, _ in rows)
        are_equal = len(rows) > 1 and len({len(ids) for ids, _ in rows}) == 1
        padded = num_tokens if are_equal else padded_tokens(num_tokens)
        batch = pack(
            rows,
            token_multiple=1 if are_equal else padded,
            label_multiple=128 if are_equal or self._graphs is None else multiple_of_labels(padded),
            is_deterministic=self._is_deterministic,
        )
        return self._embedded(in_buckets(batch)).pinned()

    def _embedded(self, batch: PackedBatch) -> PackedBatch:
        if self._embedding is None:
            return batch
        is_pinned = self._device.type == "cuda"
        return replaced(batch, {"embedded_TD": self._embedding.rows(batch.input_ids_T, is_pinned=is_pinned)})


def is_capturable(shape: ModelShape, *, capability: tuple[int, int], dtype: torch.dtype, is_deterministic: bool) -> bool:
    """Whether passes are captured in CUDA graphs: no layer's attention waits for the device, and a run that goes on from a checkpoint need
    not launch to the bit what was replayed before."""
    return not is_deterministic and all(
        choose_backend(
            capability=capability,
            dtype=dtype,
            head_dim=layer.head_dim,
            window=layer.window,
            softcap=layer.softcap,
            varlen=True,
            deterministic=is_deterministic,
        )
        != "reference"
        for layer in shape.layers
    )


def _are_same(left: Sequence[Row], right: Sequence[Row]) -> bool:
    return len(left) == len(right) and all(a[0] is b[0] for a, b in zip(left, right, strict=True))


def workload(stack: TrainingStack, spec: TrainingSpec, *, longest_row: int, mean_row: float, num_tokens: int) -> Workload:
    """The planner's view of a step."""
    layouts = {name: [block.projections[name].layout for block in stack.blocks] for name in stack.blocks[0].projections}
    return Workload(
        num_tokens=num_tokens,
        longest_row=longest_row,
        mean_row=mean_row,
        ranks=Ranks(**{name: max(layout.num_ranks for layout in each) for name, each in layouts.items()}),
        element_bytes=stack.dtype.itemsize,
        is_quantized=spec.quantization is Quantization.NF4,
        trains_weights=stack.blocks[0].projections["qkv"].trains_weights,
    )


class Passes(Protocol[SampleT_contra]):
    """What the loop asks of a path through a model. Samples are rows, or pairs of them."""

    def stepper(self, num_steps: int) -> Stepper:
        """The optimizer of what is trained."""
        ...

    def prepare(self, rows: Sequence[SampleT_contra], /) -> None:
        """Gets ready for `gradients` of these samples while the device is busy."""
        ...

    def gradients(self, rows: Sequence[SampleT_contra], /) -> torch.Tensor:
        """Adds the gradients of the mean loss over the labels of the samples, and answers it: float32, 0-dim, on the device.

        The stepper's `loss_scale` multiplies the gradients, not the answer.
        """
        ...

    def mean_loss(self, data: Samples[SampleT_contra], /) -> float:
        """The loss over all labels of `data`, without dropout."""
        ...

    def refresh(self) -> None:
        """Takes over new values of the trained parameters."""
        ...


def passes_of(model: PeftModel | PreTrainedModel, spec: TrainingSpec, data: TokenDataset) -> Passes[Row]:
    """The engine's own layers where they take the model, transformers' otherwise; which one and why is logged."""
    if (reason := unsupported(model)) is not None:
        log.info("training by transformers' own modules", reason=reason)
        return GenericPasses(model, spec)
    return packed_passes(model, spec, data)


def packed_passes(model: PeftModel | PreTrainedModel, spec: TrainingSpec, data: TokenDataset, *, num_replicas: int = 1) -> PackedPasses:
    """The engine's own layers, with memory for the longest steps of `data`, whose rows `num_replicas` share."""
    rows_per_step = spec.batch.micro_batch_size * spec.batch.gradient_accumulation_steps
    longest = sorted((int(length) for length in data.row_lengths), reverse=True)[:rows_per_step]
    num_tokens = most_tokens(longest, num_replicas=num_replicas)
    return PackedPasses(model, spec, longest_row=longest[0], mean_row=float(data.row_lengths.mean()), num_tokens=num_tokens)


def most_tokens(lengths: Sequence[int], *, num_replicas: int) -> int:
    """The most tokens that `distributed.shares` gives to one replica of a step of rows that are no longer than `lengths`.

    A row goes to whoever has least: at most the mean of the others, and no more rows than an even share (Graham 1969).
    """
    longest = max(lengths)
    return min((sum(lengths) + (num_replicas - 1) * longest) // num_replicas, -(-len(lengths) // num_replicas) * longest)


def _card_bytes(spec: TrainingSpec, device: torch.device, *, is_fixed: bool) -> int:
    """What activations and workspace may take beside what is allocated now.

    `is_fixed` counts on the whole card: what others hold must not change the plan, and with it the order of sums.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    fixed = total - _CONTEXT_BYTES - (_COLLECTIVES_BYTES if spec.gpus > 1 else 0)
    ours = (fixed if is_fixed else free + torch.cuda.memory_reserved(device)) - RESERVE_BYTES
    return spec.memory.budget_bytes(ours) - allocated


def host_bytes(spec: TrainingSpec) -> int:
    """What of the host's memory a run may pin: half of what is free, unless its spec says how much.

    A deterministic run pins nothing unless its spec says so: what others hold must not change the plan.
    """
    if spec.memory.host_budget_bytes is not None:
        return spec.memory.host_budget_bytes
    return 0 if spec.deterministic else psutil.virtual_memory().available // 2
