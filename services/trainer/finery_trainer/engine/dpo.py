"""TRL's DPO loss over the engine's model: the policy's and the reference's log-probabilities of a micro-batch of pairs, and the loss type.

Owns setting `trl.DPOTrainer` up so that it leaves the model as it was. Only its loss is used; steps, checkpoints and the order of pairs are
`preference`'s, since a Trainer's own loop weighs a short micro-batch like a full one, and does not resume bit by bit.

Shapes: R rows of a micro-batch, its chosen rows first and as many rejected ones after; T tokens; V vocabulary.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from finery_common.spec import TrainingSpec
from finery_trainer.engine.packing import IGNORE

if TYPE_CHECKING:
    from peft import PeftModel

_PAD = "<pad>"


@dataclass(frozen=True)
class TokenScores:
    """What the loss reads of a model's output, each [R, T - 1], 0 where there is no label. All but the first are for logs."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


class _OneGpu(DPOConfig):
    """Settings of a process that computes on one GPU, however many it sees."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class PairLoss(DPOTrainer):
    """A trainer that is asked for losses and never trains. `pair_loss` makes one."""

    def __init__(self, model: PeftModel, **options: Any) -> None:
        super().__init__(model=model, **options)
        self._policy = model
        # The base model scores here, in `of`: TRL's own reference would be a copy of the adapter.
        self.precompute_ref_logps = True
        # TRL's head computes in Triton, so on a GPU alone.
        self._scores = cast("Callable[..., TokenScores]", model if model.device.type == "cuda" else self._plain_scores)

    def of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of a micro-batch's pairs, a scalar.

        `inputs` has int64 `input_ids`, `attention_mask` and `completion_mask`, each [R, T].
        """
        chosen, rejected = self._reference_log_probs(inputs).chunk(2)
        try:
            scored = inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            return cast("torch.Tensor", self.compute_loss(cast("torch.nn.Module", self._scores), scored))
        finally:
            # Means for a log that nobody writes; they would grow with the run.
            for values in self._metrics.values():
                values.clear()

    def _reference_log_probs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of each row's completion under the model without its adapter, [R]."""
        labels_RT = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        model_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self._policy.disable_adapter():
            return self._scores(**model_inputs, labels=labels_RT, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)

    def _plain_scores(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> TokenScores:
        """What TRL's head answers, in plain torch: all logits at once, in float32."""
        assert fused_lm_head
        logits_RTV = self._policy(**inputs).logits[:, :-1].float()
        targets_RT = labels[:, 1:]
        is_label_RT = targets_RT != IGNORE
        picked_RT = logits_RTV.log_softmax(-1).gather(2, targets_RT.clamp(min=0)[..., None]).squeeze(2)
        zeros_RT = torch.zeros_like(picked_RT, requires_grad=False)
        return TokenScores(torch.where(is_label_RT, picked_RT, 0.0), zeros_RT, zeros_RT, zeros_RT.bool())

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Pairs are tokens already."""
        return dataset

    def _send_telemetry(self) -> None:
        """Tells nobody: what is trained here is no one else's business."""


def pair_loss(model: PeftModel, spec: TrainingSpec) -> PairLoss:
    """The loss of `spec.dpo` over `model`, whose adapter-less self is the reference. `model` keeps its adapter and its settings."""
    with tempfile.TemporaryDirectory(prefix="dpo-") as folder, _unchanged(model):
        return PairLoss(
            model,
            args=_OneGpu(
                output_dir=folder,
                beta=spec.dpo.beta,
                loss_type=[spec.dpo.loss_type.value],
                label_smoothing=spec.dpo.label_smoothing,
                seed=spec.seed,
                disable_dropout=False,
                gradient_checkpointing=False,
                bf16=model.get_base_model().dtype is torch.bfloat16,
                use_cpu=model.device.type == "cpu",
                remove_unused_columns=False,
                report_to="none",
                save_strategy="no",
                max_length=None,
            ),
            train_dataset=Dataset.from_dict({"row": [0]}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({_PAD: 0}, unk_token=_PAD)), pad_token=_PAD),
        )


@contextlib.contextmanager
def _unchanged(model: PeftModel) -> Iterator[None]:
    """Undoes what DPOTrainer does to a model that it is given: a copy of the adapter for a reference, adapters of quantized models rounded
    to 16 bits, its own padding token.
    """
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = cast("Any", model.get_base_model())
    pads = [(config, config.pad_token_id) for config in (base.config.get_text_config(), base.generation_config)]
    yield
    model.delete_adapter("ref")
    for config, pad in pads:
        config.pad_token_id = pad
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = trained[name]
