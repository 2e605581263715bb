"""What is refused when a job is created, and what a create gives: the same request twice, lists, other projects."""

from __future__ import annotations

import secrets

import pytest

from finery.training.v1 import training_pb2
from finery_common.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"suffix": "a/b"}, InvalidArgumentError, "slash"),
        ({"suffix": "A"}, InvalidArgumentError, "wanted up to 64 of a-z"),
        ({"suffix": "a" * 65}, InvalidArgumentError, "wanted up to 64"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, InvalidArgumentError, "got 17 pairs"),
        ({"metadata": {"k" * 65: "v"}}, InvalidArgumentError, "key of 65 characters"),
        ({"metadata": {"k": "v" * 513}}, InvalidArgumentError, "value of 513 characters"),
        ({"spec": {"base_model": "gpt"}}, NotFoundError, "no base model 'gpt'; there are: tiny, gone"),
        ({"spec": {"max_sequence_length": 65}}, InvalidArgumentError, "got 65, wanted at most 64"),
        ({"spec": {"lora": {"bias": "all"}}}, InvalidArgumentError, "deploy false"),
        ({"spec": {"lora": {"use_dora": True}}}, InvalidArgumentError, "use_dora: got true, .*deploy false"),
        ({"spec": {"method": "full"}}, InvalidArgumentError, "whole model and no adapter.*deploy false.*catalogue"),
        ({"spec": {"lora": {"rank": 33}}}, InvalidArgumentError, "got 33, adapters up to rank 32"),
        ({"spec": {"base_model": "gone"}, "deploy": True}, FailedPreconditionError, "gone is not being served"),
        ({"training_file": "file-" + "0" * 24}, NotFoundError, "upload it first"),
        ({"training_file": "rows.jsonl"}, InvalidArgumentError, "got 'rows.jsonl', wanted the id"),
        ({"validation_file": "file-" + "0" * 24}, NotFoundError, "validation_file: there is no file"),
    ],
)
async def test_what_cannot_work_is_refused_when_it_is_created(system, launcher, fields, kind, text):
    with pytest.raises(kind, match=text) as caught:
        await system.create(**fields)
    assert caught.value.param


async def test_what_cannot_be_served_is_trained_where_nobody_asks_to_serve_it(system, launcher):
    job = await system.create(spec={"lora": {"bias": "all", "rank": 64}}, deploy=False)
    assert job.deployment.state == training_pb2.DEPLOYMENT_STATE_NONE


async def test_a_file_of_another_project_is_unknown(system, launcher):
    foreign = system.upload()
    system.project = f"p{secrets.token_hex(6)}"
    with pytest.raises(NotFoundError, match="no file"):
        await system.create(training_file=foreign)


async def test_a_wrong_spec_names_its_fields(system, launcher):
    request = system.request()
    request.job.spec.optimizer.learning_rate = 0
    with pytest.raises(InvalidArgumentError, match=r"optimizer.learning_rate: got 0.0"):
        await system.stub.CreateJob(request, metadata=system.metadata())


async def test_the_same_request_gives_the_same_job_and_another_body_is_refused(system, launcher):
    request = system.request(request_id="one", suffix="a")
    first = await system.stub.CreateJob(request, metadata=system.metadata())
    again = await system.stub.CreateJob(request, metadata=system.metadata())
    assert first.name == again.name
    request.job.suffix = "b"
    with pytest.raises(AlreadyExistsError):
        await system.stub.CreateJob(request, metadata=system.metadata())


async def test_a_create_is_repeated_even_when_its_file_is_gone_by_then(system, launcher):
    file = system.upload()
    request = system.request(request_id="two", training_file=file)
    first = await system.stub.CreateJob(request, metadata=system.metadata())
    system.store.delete(f"projects/{system.project}/files/{file}/")
    assert (await system.stub.CreateJob(request, metadata=system.metadata())).name == first.name


async def test_jobs_are_listed_newest_first_in_pages_and_by_metadata(system, launcher):
    names = [(await system.create(metadata={"n": str(number)})).name for number in range(3)]
    listing = training_pb2.ListJobsRequest(parent=f"projects/{system.project}", page_size=2)
    page = await system.stub.ListJobs(listing, metadata=system.metadata())
    assert [job.name for job in page.jobs] == names[:0:-1]
    listing.page_token = page.next_page_token
    assert [job.name for job in (await system.stub.ListJobs(listing, metadata=system.metadata())).jobs] == names[:1]
    listing = training_pb2.ListJobsRequest(parent=f"projects/{system.project}", metadata={"n": "1"})
    assert [job.name for job in (await system.stub.ListJobs(listing, metadata=system.metadata())).jobs] == [names[1]]


async def test_another_projects_job_is_unknown(system, launcher):
    job = await system.create()
    system.project = f"p{secrets.token_hex(6)}"
    with pytest.raises(NotFoundError):
        await system.get(job.name)
    with pytest.raises(NotFoundError):
        await system.get(f"projects/{system.project}/jobs/{job.name.rpartition('/')[2]}")
