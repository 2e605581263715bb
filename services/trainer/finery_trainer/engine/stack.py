"""The whole model as the engine drives it: embedding, decoder layers, norm, head and loss, forward and backward, on packed batches.

    stack = TrainingStack(model)
    loss = stack.forward_backward(batch, num_labels=n)      # adds gradients to stack.groups
    stack.refresh()                                         # after an optimizer step

Owns the order of layers, the model's ends, and what is trained. A layer's arithmetic is `block`'s, what is kept of it the plan's, the
optimizer `optim`'s. The model keeps its modules and names; its weights move into the engine's buffers.

Shapes: T tokens of a packed batch, D hidden, V vocabulary, L labelled positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from finery_common.errors import FailedPreconditionError
from finery_kernels.linear_cross_entropy import linear_cross_entropy_forward_backward
from finery_kernels.lora import Adapter
from finery_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from finery_trainer.engine.architecture import LayerShape, ModelShape, base_of, decoder_of, describe, norms_of, rotary_tables
from finery_trainer.engine.block import Block, Gradients, Rotary, Tape
from finery_trainer.engine.loss_scale import loss_scale_of
from finery_trainer.engine.offload import Offloader
from finery_trainer.engine.packing import IGNORE, PackedBatch
from finery_trainer.engine.planner import Plan, keep_all
from finery_trainer.engine.trained import FlatGroup, flatten, in_place
from finery_trainer.engine.weights import Projection, Workspace, projections_of

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

_ROTARY_STEP = 1024
_UNPLANNED_ROWS = 4096
"""Rows that go through an MLP at a time in passes that no plan was made for: a validation row may be longer than any trained on."""


class TrainingStack:
    """A causal LM of a family in `architecture.FAMILIES`, bound to the engine. `unsupported` says beforehand whether it can be.

    Raises FailedPreconditionError for a model that can not.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, *, plan: Plan | None = None) -> None:
        if (reason := unsupported(model)) is not None:
            raise FailedPreconditionError(f"The engine's own layers do not take this model: {reason}. Train it on the generic path.")
        base = base_of(model)
        self.shape = cast("ModelShape", describe(base.config))
        decoder = decoder_of(base)
        self._embedding = cast("nn.Embedding", decoder.embed_tokens)
        self._head = cast("nn.Linear", base.get_output_embeddings())
        self._norm = cast("nn.Module", decoder.norm)
        self._rotary_module = cast("nn.Module", decoder.rotary_emb)
        self._rotary: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        # The embedding may be on the host.
        self.dtype, self.device = self._embedding.weight.dtype, cast("torch.Tensor", self._norm.weight).device
        self.workspace = Workspace(dtype=self.dtype, device=self.device)
        self.loss_scale = loss_scale_of(self.dtype, self.device)
        """By which gradients are multiplied, where their type wants it."""
        self._gradients: dict[int, torch.Tensor] = {}
        layers = list(cast("nn.ModuleList", decoder.layers))
        projections = [
            projections_of(layer, shape, workspace=self.workspace) for layer, shape in zip(layers, self.shape.layers, strict=True)
        ]
        self.groups: list[FlatGroup] = self._flatten_trained(base, projections)
        self.blocks = [
            Block(shape, projected, norms := norms_of(layer, shape), self._gradients_of(projected, norms))
            for layer, shape, projected in zip(layers, self.shape.layers, projections, strict=True)
        ]
        self._spare = max(max(p["o"].layout.num_ranks, p["down"].layout.num_ranks) for p in projections)
        self.follow(keep_all(len(self.blocks)) if plan is None else plan)

    def follow(self, plan: Plan) -> None:
        """Trains by `plan` from now on; the numbers are the same by any."""
        self.plan = plan
        self._offloader = Offloader(plan.host, device=self.device)
        for index, block in enumerate(self.blocks):
            for name, projection in block.projections.items():
                if projection.is_quantized:
                    projection.keep_resident(wanted=(index, name) in plan.resident)
        self.refresh()

    @property
    def trains_embedding(self) -> bool:
        """Whether the gradient must reach the embedding."""
        return self._embedding.weight.requires_grad

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Where the gradient of a trained parameter is added, in its shape."""
        return self._gradients[id(parameter)]

    def refresh(self) -> None:
        """Takes over what an optimizer step, or whoever else, has written to the trained parameters."""
        self.workspace.forget()
        for block in self.blocks:
            for projection in block.projections.values():
                projection.refresh()

    def zero_grad(self) -> None:
        """Gradients to zero."""
        for group in self.groups:
            group.grads_N.zero_()

    @torch.no_grad()
    def forward_backward(
        self, batch: PackedBatch, *, num_labels: int | torch.Tensor, backward_layers: Collection[int] | None = None
    ) -> torch.Tensor:
        """Adds the gradients of (summed cross-entropy / `num_labels`) and answers that loss, a float32 scalar on the device.

        `batch` is on the model's device. `num_labels` is the whole optimizer step's, so that it may be split into any batches.
        `backward_layers` is for a pass whose peak of memory is looked for: only those layers' backward passes run, each with as much memory
        beside it as in a whole pass, and the embedding's does not. Gradients are right down to the first layer that is left out.
        """
        self.workspace.forget()
        tapes: list[Tape] = [{} for _ in self.blocks]
        loss, g_ext = self._loss_backward(self._forward(batch, tapes), batch, num_labels)
        for index in reversed(range(len(self.blocks))):
            if backward_layers is not None and index not in backward_layers:
                tapes[index].clear()
                self._offloader.skipped(index)
                continue
            self._offloader.fetched(index, tapes[index])
            self.blocks[index].backward(
                g_ext,
                batch,
                self._rotary_of(self.shape.layers[index], batch),
                tape=tapes[index],
                mlp_rows=self.plan.mlp_rows,
                head_groups=self.plan.head_groups,
            )
        if self.trains_embedding and backward_layers is None:
            self._embedding_backward(batch, g_ext[:, : self.shape.hidden])
        return loss

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> torch.Tensor:
        """Cross-entropy summed over the batch's labels, a float32 scalar on the device; keeps nothing."""
        self.workspace.forget()
        hidden_TD, _, _ = self._final_norm(self._forward(batch, None))
        loss, _ = linear_cross_entropy_forward_backward(
            hidden_TD,
            self._head.weight,
            batch.targets_L,
            rows_L=batch.rows_L,
            grad_scale=torch.ones(1, device=self.device),
            softcap=self.shape.logits_softcap,
            scale=self.shape.logits_scale,
            tile_rows=self.plan.head_rows,
            ignore_index=IGNORE,
        )
        return loss

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """Of every token [T, V], in float32."""
        self.workspace.forget()
        hidden_TD, _, _ = self._final_norm(self._forward(batch, None))
        logits_TV = nn.functional.linear(hidden_TD, self._head.weight).float() * self.shape.logits_scale
        if (cap := self.shape.logits_softcap) is not None:
            logits_TV = torch.tanh(logits_TV / cap) * cap
        return logits_TV

    def _forward(self, batch: PackedBatch, tapes: list[Tape] | None) -> list[torch.Tensor]:
        """[residual, delta] after the last layer. Without tapes nothing is kept."""
        stream = [self._embed(batch)]
        for index, block in enumerate(self.blocks):
            block.forward(
                stream,
                batch,
                self._rotary_of(block.shape, batch),
                keep=self.plan.card[index] | self.plan.host[index] if tapes is not None else frozenset(),
                tape={} if tapes is None else tapes[index],
                mlp_rows=self.plan.mlp_rows if tapes is not None else min(self.plan.mlp_rows, _UNPLANNED_ROWS),
                head_groups=self.plan.head_groups,
            )
            if tapes is not None:
                self._offloader.stored(index, tapes[index])
        return stream

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        embedded_TD = batch.embedded_TD
        if embedded_TD is None:
            embedded_TD = nn.functional.embedding(batch.input_ids_T, self._embedding.weight)
        return embedded_TD if self.shape.embedding_scale == 1.0 else embedded_TD * self._embedding_scale

    @property
    def _embedding_scale(self) -> float:
        # transformers rounds Gemma's to the weights' dtype.
        return float(torch.tensor(self.shape.embedding_scale, dtype=self.dtype))

    def _final_norm(self, stream: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(norm of the sum of `stream`, the sum, the norm's rstd); empties `stream`."""
        delta_TD, residual_TD = stream.pop(), stream.pop()
        return rms_norm_forward(
            delta_TD,
            cast("torch.Tensor", self._norm.weight),
            eps=self.shape.eps,
            offset=self.shape.norm_offset,
            residual_TD=residual_TD,
            residual_out=delta_TD,
        )

    def _loss_backward(
        self, stream: list[torch.Tensor], batch: PackedBatch, num_labels: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient of the last layer's stream with spare columns [T, D + R])."""
        hidden_TD, stream_TD, rstd_T = self._final_norm(stream)
        grad_scale = _reciprocal(num_labels, device=self.device)
        loss_sum, dhidden_TD = linear_cross_entropy_forward_backward(
            hidden_TD,
            self._head.weight,
            batch.targets_L,
            rows_L=batch.rows_L,
            grad_scale=grad_scale if self.loss_scale is None else grad_scale * self.loss_scale.factor_1,
            softcap=self.shape.logits_softcap,
            scale=self.shape.logits_scale,
            tile_rows=self.plan.head_rows,
            dweight_VD=self._gradients.get(id(self._head.weight)),
            ignore_index=IGNORE,
        )
        del hidden_TD
        g_ext = dhidden_TD.new_empty(dhidden_TD.shape[0], self.shape.hidden + self._spare)
        rms_norm_backward(
            dhidden_TD,
            stream_TD,
            cast("torch.Tensor", self._norm.weight),
            rstd_T,
            offset=self.shape.norm_offset,
            out=g_ext[:, : self.shape.hidden],
            dweight_D=self._gradients.get(id(self._norm.weight)),
        )
        return loss_sum * grad_scale[0], g_ext

    def _embedding_backward(self, batch: PackedBatch, g_TD: torch.Tensor) -> None:
        grad_VD = self._gradients[id(self._embedding.weight)]
        # As with torch's own embedding, the padding token's row is not trained.
        padding = -1 if self._embedding.padding_idx is None else self._embedding.padding_idx
        part_VD = torch.ops.aten.embedding_dense_backward(g_TD, batch.input_ids_T, self.shape.vocab_size, padding, False)
        grad_VD.add_(part_VD, alpha=self._embedding_scale if self.shape.embedding_scale != 1.0 else 1.0)

    def _rotary_of(self, shape: LayerShape, batch: PackedBatch) -> Rotary:
        """Tables of at least the batch's longest sequence. Shorter ones stay: a CUDA graph may read them."""
        if shape.rope is None:
            return None, None
        tables = self._rotary.setdefault(shape.rope, [])
        if not tables or len(tables[-1][0]) < batch.max_seqlen:
            length = max(-(-batch.max_seqlen // _ROTARY_STEP) * _ROTARY_STEP, 2 * len(tables[-1][0]) if tables else 0)
            tables.append(rotary_tables(self._rotary_module, shape.rope, length=length, device=self.device))
        return tables[-1]

    def _flatten_trained(self, base: PreTrainedModel, projections: list[dict[str, Projection]]) -> list[FlatGroup]:
        """Moves every trained parameter into flat buffers; remembers where each one's gradient is."""
        groups: list[FlatGroup] = []
        stacked: set[int] = set()
        for projected in projections:
            for projection in projected.values():
                if projection.trains_weights:
                    groups.append(in_place(projection.weight(), projection.parameters))
                    stacked.update(id(parameter) for parameter in projection.parameters)
                if projection.bias_N is not None and projection.trains_bias:
                    groups.append(in_place(projection.bias_N, projection.biases))
                    stacked.update(id(bias) for bias in projection.biases)
        rest = [p for p in base.parameters() if p.requires_grad and id(p) not in stacked]
        for dtype in sorted({p.dtype for p in rest}, key=str):
            small = [p for p in rest if p.dtype == dtype and p is not self._embedding.weight and p is not self._head.weight]
            groups += [flatten(small)] if small else []
        ends = [cast("nn.Parameter", module.weight) for module in (self._embedding, self._head)]
        for weight in {id(weight): weight for weight in ends if weight.requires_grad}.values():
            groups.append(in_place(weight.data, [weight]))
        for group in groups:
            for index, (parameter, _) in enumerate(group.members):
                self._gradients[id(parameter)] = group.grad_of(index)
        return groups

    def _spanning(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The gradients of parameters that stand behind each other, as one tensor."""
        first = self._gradients[id(parameters[0])]
        return torch.as_strided(first, (sum(p.shape[0] for p in parameters), *first.shape[1:]), first.stride())

    def _gradients_of(self, projected: dict[str, Projection], norms: dict[str, torch.Tensor]) -> Gradients:
        adapters: dict[str, list[Adapter | None]] = {}
        weights: dict[str, torch.Tensor] = {}
        biases: dict[str, torch.Tensor] = {}
        for name, projection in projected.items():
            if any(adapter is not None for adapter in projection.adapters):
                adapters[name] = [
                    None if a is None else Adapter(self._gradients[id(a.a)], self._gradients[id(a.b)], a.scaling)
                    for a in projection.adapters
                ]
            if projection.trains_weights:
                weights[name] = self._spanning(projection.parameters)
            if projection.trains_bias:
                biases[name] = self._spanning(projection.biases)
        return Gradients(
            adapters=adapters,
            weights=weights,
            biases=biases,
            norms={name: self._gradients[id(weight)] for name, weight in norms.items() if id(weight) in self._gradients},
        )


def unsupported(model: PeftModel | PreTrainedModel) -> str | None:
    """Why the engine's own layers can not train this model, or None where they can."""
    base = base_of(model)
    shape = describe(base.config)
    if isinstance(shape, str):
        return shape
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    is_full = len(trained) == len(list(base.parameters()))
    for name in trained:
        if not is_full and not any(part in name for part in (".lora_A.", ".lora_B.")):
            return f"{name} is trained, and the engine's own layers train LoRA's A and B alone, or everything"
        if name.startswith("lm_head.lora") or ("embed_tokens" in name and not is_full):
            return f"{name}: an adapter outside the decoder layers"
    from peft.tuners.lora import LoraLayer

    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            reason = _unsupported_adapter(module)
            if reason is not None:
                return f"{name}: {reason}"
    return None


def _unsupported_adapter(module: LoraLayer) -> str | None:
    active = module.active_adapters
    if len(active) != 1:
        return f"{len(active)} adapters are active, wanted one"
    if any(module.use_dora.values()):
        return "DoRA"
    if not isinstance(module.lora_dropout[active[0]], nn.Identity):
        return "LoRA dropout"
    if getattr(module.lora_B[active[0]], "bias", None) is not None:
        return "a bias on LoRA's B"
    base = module.get_base_layer()
    if not isinstance(base, nn.Linear) or type(base).__name__ == "Linear8bitLt":
        return f"a base layer of type {type(base).__name__}"
    return None


def _reciprocal(num_labels: int | torch.Tensor, *, device: torch.device) -> torch.Tensor:
    """1 / num_labels as a float32 tensor of one element."""
    if isinstance(num_labels, torch.Tensor):
        return num_labels.float().reciprocal().reshape(1)
    return torch.full((1,), 1.0 / num_labels, dtype=torch.float32, device=device)
