"""Specs: validation and the round trip over the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finery.training.v1 import spec_pb2
from finery_common.errors import InvalidArgumentError
from finery_common.spec import BatchSpec, LoraSpec, MemorySpec, OptimizerSpec, OptimizerType, ScheduleType, TrainingSpec


def test_an_empty_message_means_the_defaults():
    assert TrainingSpec.from_proto(spec_pb2.TrainingSpec(base_model="m")) == TrainingSpec(base_model="m")


@given(
    st.builds(
        TrainingSpec,
        base_model=st.text("abc/-", min_size=1, max_size=20),
        lora=st.builds(LoraSpec, rank=st.integers(1, 512), alpha=st.floats(0.1, 1000), use_rslora=st.booleans()),
        optimizer=st.builds(
            OptimizerSpec,
            type=st.sampled_from(OptimizerType),
            schedule=st.sampled_from(ScheduleType),
            learning_rate=st.floats(1e-9, 1.0),
            min_warmup_steps=st.integers(0, 100),
        ),
        batch=st.builds(BatchSpec, micro_batch_size=st.integers(1, 1024)),
        max_steps=st.none() | st.integers(1, 10**6),
        seed=st.integers(0, 2**63 - 1),
    )
)
def test_a_spec_survives_the_wire(spec: TrainingSpec):
    assert TrainingSpec.from_proto(spec.to_proto(spec_pb2.TrainingSpec)) == spec


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"base_model": "m", "optimizer": {"learning_rate": 0}}, "optimizer.learning_rate", "got 0, wanted greater than 0"),
        ({"base_model": "m", "learning_rate": 1e-4}, "learning_rate", "unknown field; known are base_model"),
        ({"base_model": "m", "lora": {"rnk": 1}}, "lora.rnk", "unknown field; known are rank, alpha, dropout, bias, target_modules"),
        ({"base_model": "m", "seed": {"a": 1}}, "seed", "wanted a valid integer"),
        ({"base_model": "m", "num_epochs": "3"}, "num_epochs", "got '3', wanted a valid integer"),
        ({"base_model": "m", "seed": True}, "seed", "got True, wanted a valid integer"),
        ({"base_model": "m", "lora": {"use_rslora": "yes"}}, "lora.use_rslora", "got 'yes', wanted a valid boolean"),
        ({"base_model": "m", "num_epochs": "many"}, "num_epochs", "got 'many', wanted a valid integer"),
        ({"base_model": "m", "optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate", "wanted a finite number"),
        ({}, "base_model", "missing"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_wanted(fields, param, text):
    with pytest.raises(InvalidArgumentError) as caught:
        TrainingSpec.parse(fields)
    assert caught.value.param == param
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"method": "full", "quantization": "nf4"}, "quantization", "only frozen weights can be quantized"),
        ({"method": "full", "lora": {"rank": 4}}, "lora", "has no adapter"),
        ({"method": "full", "gpus": 2}, "gpus", "got 2 with method full, wanted 1"),
        ({"method": "dpo", "gpus": 2}, "gpus", "several GPUs train method lora only"),
        ({"method": "full", "memory": {"offload_embeddings": True}}, "memory.offload_embeddings", "trains the embeddings"),
        ({"method": "dpo", "memory": {"budget": "8GiB"}}, "memory", "keeps none"),
        ({"method": "dpo", "batch": {"max_tokens": 4096}}, "batch.max_tokens", "not packed"),
        ({"method": "dpo", "lora": {"bias": "all"}}, "lora.bias", "is the reference"),
        ({"method": "dpo", "lora": {"target_modules": ["lm_head"]}}, "lora.target_modules", "the head's own weights"),
        ({"batch": {"max_tokens": 100}}, "batch.max_tokens", "wanted at least max_sequence_length, 2048"),
        ({"dpo": {"beta": 0.5}}, "dpo", "use method dpo"),
        ({"method": "dpo", "dpo": {"label_smoothing": 0.1}}, "dpo.label_smoothing", "belongs to loss_type robust"),
        ({"lora": {"use_dora": True, "bias": "all"}}, "lora.use_dora", "wanted one of the two"),
        ({"optimizer": {"embedding_learning_rate": 1e-5}}, "optimizer.embedding_learning_rate", "neither embeddings nor head train"),
        ({"memory": {"budget": "most"}}, "memory.budget", "got 'most'"),
        ({"memory": {"budget": "0GiB"}}, "memory.budget", "wanted auto, a fraction up to 1, or a number of bytes"),
        ({"memory": {"budget": True}}, "memory.budget", "got True"),
        ({"memory": {"budget": 1.5}}, "memory.budget", "got '1.5', wanted auto, a fraction up to 1"),
        ({"memory": {"budget": "1e999"}}, "memory.budget", "got '1e999', wanted auto"),
        ({"memory": {"budget": "0.000001MB"}}, "memory.budget", "or a number of bytes"),
        ({"gpus": 2, "quantization": "int8"}, "gpus", "got 2 with quantization int8, wanted 1"),
        ({"gpus": 2, "lora": {"use_dora": True}}, "gpus", "got 2 with lora.use_dora, wanted 1"),
        ({"gpus": 2, "lora": {"dropout": 0.1}}, "gpus", "got 2 with lora.dropout 0.1, wanted 1"),
        ({"gpus": 2, "lora": {"bias": "all"}}, "gpus", "got 2 with lora.bias all, wanted 1"),
        ({"gpus": 2, "lora": {"target_modules": ["q_proj", "lm_head"]}}, "gpus", "got 2 with lm_head in lora.target_modules"),
        ({"precision": "float8"}, "precision", "got 'float8', wanted 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"method": "full", "precision": "float16"}, "precision", "got float16 with method full, wanted bfloat16 or float32"),
        (
            {"memory": {"budget": "24gib"}},
            "memory.budget",
            "got '24gib', wanted auto, a fraction up to 1, or a number of bytes, such as 24GiB",
        ),
        ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules", "got 'q_proj', wanted a list"),
    ],
)
def test_fields_that_cannot_hold_together_are_refused_by_the_one_to_change(fields, param, text):
    with pytest.raises(InvalidArgumentError) as caught:
        TrainingSpec.parse({"base_model": "m", **fields})
    assert caught.value.param == param
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("budget", "num_bytes"),
    [("auto", 1000), (0.5, 500), ("0.25", 250), (1, 1000), (600, 600), ("600", 600), (5000, 1000), ("1MB", 1000)],
)
def test_a_memory_budget_is_everything_free_or_a_share_or_bytes_and_never_more_than_is_free(budget, num_bytes):
    assert MemorySpec.parse({"budget": budget}).budget_bytes(1000) == num_bytes


@pytest.mark.parametrize(("budget", "num_bytes"), [("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), (2**33, 2**33)])
def test_a_memory_budget_in_units_is_that_many_bytes(budget, num_bytes):
    assert MemorySpec.parse({"budget": budget}).budget_bytes(1 << 40) == num_bytes


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-4), ("full", 2e-5), ("dpo", 5e-6)])
def test_the_learning_rate_is_the_methods_unless_given(method, rate):
    def rate_of(**fields) -> float:
        return TrainingSpec.parse({"base_model": "m", "method": method, **fields}).optimizer.learning_rate

    assert rate_of() == rate_of(optimizer={"beta1": 0.8}) == rate_of(optimizer=OptimizerSpec(beta1=0.8)) == rate
    assert rate_of(optimizer={"learning_rate": 2e-4}) == rate_of(optimizer=OptimizerSpec(learning_rate=2e-4)) == 2e-4
    spec = TrainingSpec.parse({"base_model": "m", "method": method})
    assert TrainingSpec.from_proto(spec.to_proto(spec_pb2.TrainingSpec)) == spec == TrainingSpec.parse(spec.model_dump(mode="json"))
    message = spec_pb2.TrainingSpec(base_model="m", method=f"METHOD_TYPE_{method.upper()}", optimizer=spec_pb2.OptimizerSpec(beta1=0.8))
    assert TrainingSpec.from_proto(message).optimizer == OptimizerSpec(beta1=0.8, learning_rate=rate)


@pytest.mark.parametrize(("fields", "param"), [({"method": ["dpo"]}, "method"), ({"method": "dpo", "optimizer": 3}, "optimizer")])
def test_what_is_no_method_or_optimizer_is_named(fields, param):
    with pytest.raises(InvalidArgumentError) as caught:
        TrainingSpec.parse({"base_model": "m", **fields})
    assert caught.value.param == param


def test_every_kind_of_run_that_holds_survives_the_wire():
    for fields in (
        {"method": "full", "optimizer": {"embedding_learning_rate": 1e-5}},
        {"quantization": "nf4", "lora": {"use_rslora": True, "b_learning_rate_ratio": 16.0}, "gpus": 8, "deterministic": False},
        {"quantization": "nf4", "lora": {"use_dora": True}},
        {"method": "dpo", "quantization": "int8", "dpo": {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1}},
        {"memory": {"budget": 0.5, "host_budget_bytes": 0, "offload_embeddings": True}, "batch": {"max_tokens": 8192}},
    ):
        spec = TrainingSpec.parse({"base_model": "m", **fields})
        assert TrainingSpec.from_proto(spec.to_proto(spec_pb2.TrainingSpec)) == spec


def test_an_unset_enum_number_of_the_future_is_refused():
    message = spec_pb2.TrainingSpec(base_model="m", optimizer=spec_pb2.OptimizerSpec(type=99))
    with pytest.raises(InvalidArgumentError, match="optimizer.type"):
        TrainingSpec.from_proto(message)
