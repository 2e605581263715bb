"""From a file on disk to shards, through real worker processes."""

import asyncio
import itertools
import json
import os
import time
from datetime import UTC, datetime

import numpy as np
import psutil
import pytest
import safetensors.numpy

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_common.spec import DatasetType
from finery_dataprep import pool
from finery_dataprep.preparation import MIN_ROWS, prepare
from finery_dataprep.shards import ShardWriter

NOW = datetime(2026, 1, 2, tzinfo=UTC)
GOOD = json.dumps({"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]})


class Objects:
    """Stands where the object store does: keeps what is written."""

    def __init__(self):
        self.data = {}

    def put_bytes(self, name, *, data):
        assert name not in self.data
        self.data[name] = data

    def shards(self):
        return [safetensors.numpy.load(self.data[name]) for name in sorted(self.data) if name.startswith("shard-")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


async def run(
    path,
    base,
    *,
    objects=None,
    dataset_type=DatasetType.SUPERVISED,
    shard_bytes=10**6,
    max_workers=2,
    max_sequence_length=4096,
    on_progress=None,
):
    async def ignore(done, total):
        pass

    return await prepare(
        path,
        base=base,
        dataset_type=dataset_type,
        max_sequence_length=max_sequence_length,
        now=NOW,
        max_workers=max_workers,
        shards=ShardWriter(objects or Objects(), dataset_type=dataset_type, shard_bytes=shard_bytes),
        on_progress=on_progress or ignore,
    )


def pair(question, preferred, other):
    return json.dumps(
        {
            "input": {"messages": [{"role": "user", "content": question}]},
            "preferred_output": [{"role": "assistant", "content": preferred}],
            "non_preferred_output": [{"role": "assistant", "content": other}],
        }
    )


async def test_shards_of_pairs_hold_both_rows_and_no_pair_is_split(make_base, path):
    base, objects = make_base("chatml"), Objects()
    path.write_text("".join(pair(f"number {i}", str(i), f"not {i} " * (i % 7)) + "\n" for i in range(400)))
    statistics = await run(path, base, objects=objects, dataset_type=DatasetType.PREFERENCE, shard_bytes=20_000)
    shards = objects.shards()
    assert len(shards) > 3
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(base.tokenizer_path)
    outputs: dict[str, list[str]] = {"chosen": [], "rejected": []}
    longest = []
    for shard in shards:
        assert len(shard["chosen_row_offsets"]) == len(shard["rejected_row_offsets"])
        assert shard.keys() == {f"{side}_{name}" for side in outputs for name in ("input_ids", "label_mask", "row_offsets")}
        for side, texts in outputs.items():
            for start, end in itertools.pairwise(shard[f"{side}_row_offsets"]):
                labels = shard[f"{side}_input_ids"][start:end][shard[f"{side}_label_mask"][start:end] == 1]
                texts.append(tokenizer.decode(labels.tolist(), skip_special_tokens=True))
        longest.append(np.maximum(np.diff(shard["chosen_row_offsets"]), np.diff(shard["rejected_row_offsets"])))
    assert outputs == {"chosen": [str(i) for i in range(400)], "rejected": [f"not {i} " * (i % 7) for i in range(400)]}
    assert statistics.num_rows == 400
    assert statistics.num_tokens == sum(len(shard[f"{side}_input_ids"]) for shard in shards for side in outputs)
    assert statistics.num_label_tokens == sum(int(shard[f"{side}_label_mask"].sum()) for shard in shards for side in outputs)
    lengths = np.sort(np.concatenate(longest))
    assert (statistics.min_row_tokens, statistics.max_row_tokens) == (lengths[0], lengths[-1])
    assert statistics.median_row_tokens == lengths[199]


@pytest.mark.parametrize(
    ("dataset_type", "row", "words"),
    [
        (DatasetType.PREFERENCE, GOOD, "method dpo trains on rows of preferences"),
        (DatasetType.SUPERVISED, pair("q", "a", "b"), "rows of preferences are for method dpo"),
    ],
)
async def test_rows_of_the_other_kind_are_refused_with_a_hint(make_base, path, dataset_type, row, words):
    path.write_text((row + "\n") * 12)
    with pytest.raises(InvalidArgumentError, match=words):
        await run(path, make_base("chatml"), dataset_type=dataset_type)


async def test_a_pair_that_is_too_long_names_the_output(make_base, path):
    path.write_text((pair("q", "a", "b") + "\n") * 11 + pair("q", "a", "long " * 300) + "\n")
    with pytest.raises(InvalidArgumentError) as caught:
        await run(path, make_base("chatml"), dataset_type=DatasetType.PREFERENCE, max_sequence_length=200)
    [violation] = caught.value.violations
    assert (violation.line, violation.field) == (12, "non_preferred_output")
    assert "wanted at most 200" in violation.description


async def test_shards_hold_every_row_in_order_and_none_is_split(make_base, path):
    base, objects = make_base("chatml"), Objects()
    path.write_text("".join(json.dumps({"prompt": f"number {i}", "completion": str(i)}) + "\n" for i in range(600)))
    statistics = await run(path, base, objects=objects, shard_bytes=20_000)
    shards = objects.shards()
    assert len(shards) > 3
    completions = []
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(base.tokenizer_path)
    for shard in shards:
        assert [shard[name].dtype for name in ("input_ids", "label_mask", "row_offsets")] == [np.int32, np.uint8, np.int64]
        offsets = shard["row_offsets"]
        assert offsets[0] == 0
        assert offsets[-1] == len(shard["input_ids"]) == len(shard["label_mask"])
        for start, end in itertools.pairwise(offsets):
            labels = shard["input_ids"][start:end][shard["label_mask"][start:end] == 1]
            completions.append(tokenizer.decode(labels.tolist(), skip_special_tokens=True))
    assert completions == [str(i) for i in range(600)]
    assert statistics.num_rows == 600
    assert statistics.num_tokens == sum(len(shard["input_ids"]) for shard in shards)
    assert statistics.num_label_tokens == sum(int(shard["label_mask"].sum()) for shard in shards)
    lengths = np.concatenate([np.diff(shard["row_offsets"]) for shard in shards])
    assert statistics.min_row_tokens == lengths.min()
    assert statistics.max_row_tokens == lengths.max()
    assert statistics.median_row_tokens == np.sort(lengths)[299]
    assert json.loads(objects.data["statistics.json"])["num_rows"] == 600


async def test_every_bad_row_is_reported_with_its_line(make_base, path):
    rows = [GOOD] * 12
    rows[1], rows[4], rows[9] = "not json", '{"prompt": "p"}', json.dumps({"prompt": "word " * 400, "completion": "c"})
    path.write_text("\n".join(rows))
    with pytest.raises(InvalidArgumentError) as caught:
        await run(path, make_base("chatml"), max_sequence_length=256)
    error = caught.value
    assert (error.code, error.param) == ("invalid_training_file", "file")
    assert error.message.startswith("3 of 12 rows cannot be used; the first is line 2: row: not JSON")
    assert [(item.line, item.field) for item in error.violations] == [(2, "row"), (5, "completion"), (10, "row")]
    assert "wanted at most 256 (max_sequence_length)" in error.violations[2].description


async def test_many_bad_rows_are_counted_and_the_first_hundred_listed(make_base, path):
    objects = Objects()
    path.write_text(f"{GOOD}\n" + "bad\n" * 5000)
    with pytest.raises(InvalidArgumentError, match=r"^5000 of 5001 rows .* The first 100 are listed, 4900 are not\.") as caught:
        await run(path, make_base("chatml"), objects=objects)
    assert [item.line for item in caught.value.violations] == list(range(2, 102))
    assert objects.data == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "The file is empty"),
        (b"\n\r\n  \n", "The file is empty"),
        (GOOD.encode(), f"The file has 1 row, wanted at least {MIN_ROWS}"),
        ((GOOD + "\n").encode() * 9, f"The file has 9 rows, wanted at least {MIN_ROWS}"),
        (GOOD.encode("utf-16"), "UTF-16, wanted UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
        (b"PK\x03\x04 a zip", "not JSON"),
    ],
)
async def test_what_is_no_training_file_is_named(make_base, path, content, words):
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=words):
        await run(path, make_base("chatml"))


async def test_a_byte_order_mark_and_windows_line_ends_are_fine(make_base, path):
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + "\r\n").encode() * 10)
    assert (await run(path, make_base("chatml"))).num_rows == 10


async def test_progress_reaches_the_number_of_lines(make_base, path):
    seen = []

    async def note(done, total):
        seen.append((done, total))

    path.write_text(f"{GOOD}\n" * 1000)
    await run(path, make_base("chatml"), on_progress=note)
    assert seen == [(256, 1000), (512, 1000), (768, 1000), (1000, 1000)]


async def test_a_template_that_hangs_beyond_its_own_limit_is_killed(make_base, path, monkeypatch):
    monkeypatch.setattr(pool, "ANSWER_LIMIT_S", 3.0)
    path.write_text(f"{GOOD}\n" * 10)
    # One long C call: no signal handler runs inside it.
    hang = "{% if messages | length > 1 and messages[1].content == 'answer' %}{{ (7 ** 9999999) % 3 }}{% endif %}"
    base = make_base(hang + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    started_s = time.monotonic()
    with pytest.raises(FailedPreconditionError) as caught:
        await run(path, base)
    assert caught.value.code == "chat_template_limit"
    assert time.monotonic() - started_s < 15
    assert workers_alive() == []


async def test_cancelling_ends_the_workers_within_a_second(make_base, path):
    path.write_text(f"{GOOD}\n" * 100_000)
    started = asyncio.Event()

    async def note(done, total):
        started.set()

    task = asyncio.create_task(run(path, make_base("chatml"), on_progress=note))
    await started.wait()
    assert len(workers_alive()) == 2
    started_s = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started_s < 1
    assert workers_alive() == []


async def test_a_worker_sees_no_credentials(make_base, path, monkeypatch):
    monkeypatch.setenv("FINERY_S3_SECRET_KEY", "hidden")
    path.write_text(f"{GOOD}\n" * 500)
    environments = []

    async def note(done, total):
        environments.extend(worker.environ() for worker in workers_alive())

    await run(path, make_base("chatml"), on_progress=note)
    assert environments
    assert not any(key.startswith("FINERY_") for environment in environments for key in environment)


def workers_alive():
    children = psutil.Process(os.getpid()).children()
    return [child for child in children if "finery_dataprep.worker" in " ".join(child.cmdline())]
