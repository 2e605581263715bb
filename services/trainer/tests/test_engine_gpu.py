"""The engine on a GPU: bfloat16 weights, 8-bit optimizer states, and going on from a checkpoint there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from finery_common.spec import TrainingSpec
from finery_trainer import engine
from finery_trainer.engine.loop import Action, StepReport
from finery_trainer.engine.trained import flatten

pytestmark = pytest.mark.gpu

NUM_ROWS, ROW_TOKENS, VOCABULARY = 64, 48, 512
SPEC = TrainingSpec.parse(
    {
        "base_model": "tiny",
        "optimizer": {"learning_rate": 5e-3, "min_warmup_steps": 2},
        "lora": {"rank": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        "num_epochs": 4,
    }
)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def training_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that repeat one pattern, which an adapter can learn."""
    pattern = np.random.default_rng(0).integers(0, VOCABULARY, ROW_TOKENS)
    folder = tmp_path_factory.mktemp("data")
    tensors = {
        "input_ids": np.tile(pattern, NUM_ROWS).astype(np.int32),
        "label_mask": np.ones(NUM_ROWS * ROW_TOKENS, dtype=np.uint8),
        "row_offsets": np.arange(NUM_ROWS + 1, dtype=np.int64) * ROW_TOKENS,
    }
    save_file(tensors, folder / "shard-00000.safetensors")
    return folder


@pytest.fixture(scope="module")
def data(training_dir: Path) -> engine.data.TokenDataset:
    return engine.data.TokenDataset(training_dir)


def test_the_loss_falls_in_bfloat16_with_8_bit_states(base_dir: Path, data: engine.data.TokenDataset):
    model = engine.load(SPEC, base_dir)
    assert model.device.type == "cuda"
    assert model.get_base_model().dtype is torch.bfloat16
    reports: list[StepReport] = []
    engine.loop.train(model, data, SPEC, lambda report: reports.append(report) or Action.CONTINUE)
    assert reports[-1].loss < reports[0].loss / 2
    assert reports[-1].memory_bytes > sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_default_optimizer_keeps_8_bit_states(base_dir: Path):
    model = engine.load(SPEC, base_dir)
    groups = [flatten([parameter for parameter in model.parameters() if parameter.requires_grad])]
    stepper = engine.optim.build_flat_optimizer(SPEC.optimizer, groups, num_steps=10)
    model(
        input_ids=torch.zeros(1, 8, dtype=torch.long, device="cuda"), labels=torch.zeros(1, 8, dtype=torch.long, device="cuda")
    ).loss.backward()
    stepper.apply()
    assert torch.uint8 in {tensor.dtype for tensor in stepper.optimizer.state()[0].values()}


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_run_goes_on_from_its_checkpoint(base_dir: Path, data: engine.data.TokenDataset, tmp_path: Path, is_deterministic: bool):
    spec, whole, first, second = SPEC.model_copy(update={"deterministic": is_deterministic}), [], [], []
    engine.loop.train(engine.load(spec, base_dir), data, spec, lambda report: whole.append(report.loss) or Action.CONTINUE)

    def pause_after_ten(report: StepReport) -> Action:
        first.append(report.loss)
        return Action.PAUSE if report.step == 10 else Action.CONTINUE

    def keep(_: StepReport, save: Callable[[Path], None]) -> None:
        save(tmp_path)

    engine.loop.train(engine.load(spec, base_dir), data, spec, pause_after_ten, on_checkpoint=keep)
    engine.loop.train(
        engine.load(spec, base_dir), data, spec, lambda report: second.append(report.loss) or Action.CONTINUE, resume_from=tmp_path
    )
    assert len(first) == 10
    assert len(first + second) == len(whole)
    if is_deterministic:
        assert first + second == whole
    # Other reruns on a GPU differ in summation order; a state that was lost would differ far more than this.
    assert np.allclose(first + second, whole, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("indices", [(0, 0), (0, 1)], ids=["one GPU, Gloo", "two GPUs, NCCL"])
def test_two_replicas_take_the_steps_of_one(base_dir: Path, data: engine.data.TokenDataset, training_dir: Path, indices: tuple[int, int]):
    if torch.cuda.device_count() <= max(indices):
        pytest.skip("needs two GPUs")
    alone, together = [], []
    engine.loop.train(engine.load(SPEC, base_dir), data, SPEC, lambda report: alone.append(report.loss) or Action.CONTINUE)
    engine.distributed.train(
        engine.load(SPEC, base_dir),
        data,
        SPEC,
        lambda report: together.append(report.loss) or Action.CONTINUE,
        base_dir=base_dir,
        training_dir=training_dir,
        devices=[torch.device("cuda", index) for index in indices],
    )
    # As above: they differ in summation order.
    assert np.allclose(together, alone, rtol=0.05, atol=0.02)
