"""Specs: validation and the round trip over the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finery.training.v1 import spec_pb2
from finery_common.errors import InvalidArgumentError
from finery_common.spec import BatchSpec, LoraSpec, OptimizerSpec, OptimizerType, ScheduleType, TrainingSpec


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


def test_an_unset_enum_number_of_the_future_is_refused():
    message = spec_pb2.TrainingSpec(base_model="m", optimizer=spec_pb2.OptimizerSpec(type=99))
    with pytest.raises(InvalidArgumentError, match="optimizer.type"):
        TrainingSpec.from_proto(message)
