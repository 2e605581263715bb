"""What keys have used: the arithmetic, and the table that processes share."""

import asyncio
import math
import sys

import pytest

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_gateway.admission import Admission, Allowance, Cost, GenerationRecord, cost_of, duration
from finery_gateway.errors import RateLimitedError
from finery_gateway.limit_table import MAX_PROCESSES, LimitTable
from finery_gateway.limits import Bucket, KeyLimits

THREE = KeyLimits(requests_per_minute=3)
TOKENS = KeyLimits(tokens_per_minute=600)
STREAMS = KeyLimits(concurrent_streams=2)


@pytest.fixture
def now_s() -> list[float]:
    return [50.0]


@pytest.fixture
def table(tmp_path, now_s):
    table = LimitTable.open(tmp_path / "run" / "limits", clock=lambda: now_s[0])
    yield table
    table.close()


def _takes(table: LimitTable, limits: KeyLimits, *, key_id: str = "key-a", **amounts: int) -> bool:
    return table.take(key_id, limits, **amounts)[1] is None


def test_a_minutes_worth_goes_at_once_and_then_one_as_each_comes_back(table, now_s):
    assert [_takes(table, THREE, requests=1) for _ in range(4)] == [True, True, True, False]
    standing, refusal = table.take("key-a", THREE, requests=1)
    assert (refusal.limit, refusal.wait_s) == ("requests", pytest.approx(20))
    assert (standing.requests.remaining, standing.requests.reset_s) == (0, pytest.approx(60))
    now_s[0] += 19.9
    assert not _takes(table, THREE, requests=1)
    now_s[0] += 0.1
    assert _takes(table, THREE, requests=1)
    assert not _takes(table, THREE, requests=1)
    now_s[0] += 1000
    assert [_takes(table, THREE, requests=1) for _ in range(4)] == [True, True, True, False]


def test_over_many_minutes_no_more_goes_through_than_the_limit_and_one_bucket(table, now_s):
    limits, taken = KeyLimits(requests_per_minute=7), 0
    for _ in range(6000):
        taken += _takes(table, limits, requests=1)
        now_s[0] += 0.1
    assert taken == 7 * 10 + 7 - 1


def test_what_is_left_is_a_whole_number_however_it_was_taken():
    bucket = Bucket(1000, 0.0, 123456.789)
    for used in range(1, 1001):
        bucket = bucket.after(1)
        assert bucket.remaining == 1000 - used
    assert bucket.wait_s(1) == pytest.approx(0.06)
    assert bucket.after(-1000).wait_s(1000) == 0
    assert bucket.wait_s(1001) == math.inf


def test_a_debt_is_waited_off_and_giving_back_never_makes_more_than_a_minutes_worth(table, now_s):
    assert _takes(table, TOKENS, tokens=600)
    table.charge("key-a", TOKENS, tokens=600)
    assert table.take("key-a", TOKENS, tokens=1)[1].wait_s == pytest.approx(60.1)
    now_s[0] += 61
    assert _takes(table, TOKENS, tokens=10)
    now_s[0] += 600
    table.charge("key-a", TOKENS, tokens=-600)
    assert not _takes(table, TOKENS, tokens=601)
    assert _takes(table, TOKENS, tokens=600)
    assert not _takes(table, TOKENS, tokens=1)


def test_what_one_limit_refuses_is_taken_from_none(table):
    limits = KeyLimits(requests_per_minute=10, tokens_per_minute=100, concurrent_streams=1)
    assert _takes(table, limits, tokens=60, streams=1)
    assert table.take("key-a", limits, requests=1, tokens=60, streams=1)[1].limit == "tokens"
    assert table.take("key-a", limits, requests=1, tokens=40, streams=1)[1].limit == "streams"
    standing = table.charge("key-a", limits)
    assert (standing.requests.remaining, standing.tokens.remaining, table.num_streams("key-a")) == (10, 40, 1)
    assert _takes(table, limits, key_id="key-b", requests=1, tokens=60, streams=1)


def test_a_limit_out_of_bounds_is_refused_by_name():
    for wrong in ({"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"concurrent_streams": 10_001}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            KeyLimits(**wrong)


def test_processes_count_together(table, tmp_path, now_s):
    other = LimitTable.open(tmp_path / "run" / "limits", clock=lambda: now_s[0])
    assert [_takes(each, THREE, requests=1) for each in (table, other, table, other)] == [True, True, True, False]
    assert [_takes(each, STREAMS, streams=1) for each in (table, other, table)] == [True, True, False]
    other.charge("key-a", STREAMS, streams=-1)
    assert _takes(table, STREAMS, streams=1)
    other.close()


def test_the_streams_of_a_process_that_ended_count_no_longer(table, tmp_path):
    other = LimitTable.open(tmp_path / "run" / "limits")
    assert [_takes(other, STREAMS, streams=1) for _ in range(2)] == [True, True]
    assert not _takes(table, STREAMS, streams=1)
    other.close()
    assert _takes(table, STREAMS, streams=1)
    # One that takes the dead one's number starts with nothing open.
    third = LimitTable.open(tmp_path / "run" / "limits")
    assert [_takes(third, STREAMS, streams=1) for _ in range(2)] == [True, False]
    third.close()


async def test_killed_processes_leave_no_streams_and_lose_no_counts(table, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from finery_gateway.limit_table import LimitTable; "
        "from finery_gateway.limits import KeyLimits; limits = KeyLimits(tokens_per_minute=60_000, concurrent_streams=2); "
        "table = LimitTable.open(Path(sys.argv[1]), clock=lambda: 50.0); table.take('key-a', limits, streams=1); "
        "[table.charge('key-a', limits, tokens=5) for _ in range(3000)]; print('done', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run" / "limits")]
    processes = [await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE) for _ in range(2)]
    limits = KeyLimits(tokens_per_minute=60_000, concurrent_streams=2)
    try:
        async with asyncio.timeout(60):
            for process in processes:
                assert process.stdout is not None
                assert await process.stdout.readline() == b"done\n"
        assert table.charge("key-a", limits).tokens.remaining == 60_000 - 2 * 3000 * 5
        assert not _takes(table, limits, streams=1)
    finally:
        for process in processes:
            process.kill()
            await process.wait()
    assert _takes(table, limits, streams=1)


def test_keys_in_use_keep_their_counts_however_many_others_come_by(table, now_s):
    for _ in range(3):
        assert _takes(table, THREE, requests=1)
    assert _takes(table, STREAMS, key_id="key-open", streams=1)
    for number in range(20_000):
        now_s[0] += 1e-6
        table.charge(f"key-{number}", THREE)
    assert not _takes(table, THREE, requests=1)
    assert table.num_streams("key-open") == 1


def test_the_first_process_starts_anew_and_a_later_one_does_not(table, tmp_path):
    file = tmp_path / "run" / "limits"
    assert _takes(table, KeyLimits(requests_per_minute=1), requests=1)
    later = LimitTable.open(file, clock=lambda: 50.0)
    assert not _takes(later, KeyLimits(requests_per_minute=1), requests=1)
    later.close()
    first = LimitTable.open(tmp_path / "other", clock=lambda: 1e9)
    assert _takes(first, KeyLimits(requests_per_minute=1), requests=1)
    first.close()
    # As after a boot, when the clock begins again.
    second = LimitTable.open(tmp_path / "other", clock=lambda: 1.0)
    assert _takes(second, KeyLimits(requests_per_minute=1), requests=1)
    second.close()


def test_a_file_that_cannot_be_made_or_shared_by_more_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPreconditionError, match="make the folder writable"):
        LimitTable.open(tmp_path / "file" / "limits")
    tables = [LimitTable.open(tmp_path / "limits") for _ in range(MAX_PROCESSES)]
    with pytest.raises(FailedPreconditionError, match="run fewer"):
        LimitTable.open(tmp_path / "limits")
    for table in tables:
        table.close()


def test_the_cost_of_a_request_is_its_bytes_its_token_ids_and_all_it_may_generate():
    chat = "/v1/chat/completions"
    long = cost_of(chat, {"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 10})
    assert 1000 <= long.prompt_tokens < 1030
    assert (long.completion_tokens, long.bounded) == (10, True)
    assert cost_of(chat, {"messages": [], "max_completion_tokens": 5, "max_tokens": 9, "n": 3}).completion_tokens == 15
    assert cost_of(chat, {"messages": []}) == Cost(4, 1024, bounded=False)
    completions = "/v1/completions"
    assert cost_of(completions, {"prompt": "x"}).completion_tokens == 16
    ids = cost_of(completions, {"prompt": [[1] * 100, [2] * 50], "max_tokens": 7, "n": 2})
    assert 150 <= ids.prompt_tokens < 160
    assert ids.completion_tokens == 7 * 2 * 2
    assert cost_of(completions, {"prompt": ["a", "b"], "max_tokens": 7}).completion_tokens == 14
    # Four bytes, not four characters.
    assert cost_of(completions, {"prompt": "漢" * 400}).prompt_tokens >= 300


def _admission(table: LimitTable, body: dict[str, object], *, limits: KeyLimits = TOKENS) -> Admission:
    allowance = Allowance(table, key_id="key-a", limits=limits)
    return Admission(allowance, path="/v1/chat/completions", body=body, record=GenerationRecord(), streams=True)


def test_a_stream_takes_more_as_it_goes_beyond_what_was_taken_for_it(table):
    admission = _admission(table, {"messages": [], "max_tokens": 10})
    admission.enter()
    assert table.charge("key-a", TOKENS).tokens.remaining == 600 - 18
    for _ in range(200):
        admission.saw(b'data: {"choices": [{"text": "\\n\\n"}]}\n\n')
    left = table.charge("key-a", TOKENS).tokens.remaining
    assert 600 - 200 - 8 - 64 <= left <= 600 - 200 - 8
    admission.leave(failed=True)
    assert table.charge("key-a", TOKENS).tokens.remaining == 600


def test_an_answer_without_a_bound_takes_no_more_than_a_minute_has(table):
    admission = _admission(table, {"messages": []})
    admission.enter()
    assert table.charge("key-a", TOKENS).tokens.remaining == 0
    with pytest.raises(RateLimitedError, match="try again in") as caught:
        _admission(table, {"messages": []}).enter()
    assert caught.value.retry_after_s == pytest.approx(60)
    with pytest.raises(RateLimitedError, match="too large") as caught:
        _admission(table, {"messages": ["x" * 2400]}).enter()
    assert caught.value.retry_after_s is None


def test_durations_are_written_as_openai_writes_them():
    written = [duration(seconds) for seconds in (0, 0.0171, 1, 1.5, 59.9999, 60, 90.25, 360)]
    assert written == ["0ms", "18ms", "1s", "1.5s", "1m0s", "1m0s", "1m30.25s", "6m0s"]
