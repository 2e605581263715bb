"""The training benchmark's own logic: names of workloads, data, plans, merging, ratios, the clock and the search. No engine is loaded."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import baselines, kernel_profile, measure, random_model, train, workloads
from benchmarks.baselines import Row
from benchmarks.worker import PREFIX
from benchmarks.workloads import parse, parse_all
from finery_common.errors import ResourceExhaustedError
from finery_trainer.engine.planner import Plan, keep_all

NAMES = [
    "qlora 2x2048x4",
    "qlora 1x8192",
    "lora 2x2048x4 equal-memory",
    "qlora short 2x4",
    "qlora short 2x4 packing",
    "qlora short 2x4 equal-memory",
    "fft 2x2048x2",
    "context qlora 24",
    "context qlora 80 500000",
    "load qlora",
    "qlora 2x2048x4 deterministic",
    "qlora 2x2048x8 gpus2",
]


def row(workload: str, engine: str, tok_s: float | None = 100.0, run: str = "a", **more) -> Row:
    return Row(workload=workload, engine=engine, tok_s=tok_s, run_id=run, **more)


@pytest.mark.parametrize("name", NAMES)
def test_a_workloads_name_reads_back(name):
    assert parse(name).name == name
    assert parse(parse(name).name) == parse(name)


def test_an_accumulation_of_one_is_left_out_of_the_name():
    assert parse("qlora 1x8192x1").name == "qlora 1x8192"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "qlora",
        "qlora 2x2048x4 packing",
        "dpo 1x8",
        "qlora 0x8",
        "qlora 1x1",
        "context qlora 1",
        "context qlora 24 100",
        "context qlora 999",
        "qlora 3x77 equal-memory",
        "qlora 1x8 gpus0",
        "fft 1x8 gpus2",
        "qlora short 2x4 gpus2",
        "load dpo",
    ],
)
def test_what_is_no_workload_is_refused(text):
    with pytest.raises(ValueError, match="workload"):
        parse_all(text)


def test_a_list_of_workloads_has_each_once():
    assert [one.name for one in parse_all("qlora 1x8192,  lora  1x8192 ,qlora 1x8192x1,")] == ["qlora 1x8192", "lora 1x8192"]


def test_memory_is_limited_by_the_peers_peak_or_by_the_card():
    assert parse("qlora 2x2048x4").budget_gib is None
    assert parse("qlora 2x2048x4 equal-memory").budget_gib == 7.27
    assert parse("context qlora 24").budget_gib == 24 - workloads.RESERVED_GIB


def test_long_steps_are_measured_three_times_and_small_ones_five():
    assert [parse(name).num_steps[1] for name in ("qlora 2x2048x4", "qlora 1x32768", "qlora 1x131072")] == [5, 3, 3]


def test_every_engine_trains_on_the_same_ids():
    work = parse("qlora 2x16x3")
    first, again, second = (workloads.token_rows(work, step) for step in (0, 0, 1))
    assert [len(one) for one in first] == [16] * 6
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert 0 <= np.min(first) <= np.max(first) < workloads.NUM_TOKEN_IDS


def test_short_rows_have_the_wanted_mean():
    lengths = workloads.short_lengths(2000)
    assert abs(np.mean(lengths) / workloads.MEAN_SHORT_TOKENS - 1) < 0.05
    assert [len(text.split()) for text in workloads.short_texts(20)] == workloads.short_lengths(20)


def test_short_steps_take_rows_in_order_and_begin_anew():
    rows = [np.full(length, length) for length in (5, 6, 7)]
    steps = workloads.short_steps(rows, parse("qlora short 2x2"), 2)
    assert [[len(one) for one in step] for step in steps] == [[5, 6, 7, 5], [6, 7, 5, 6]]


def test_packed_steps_hold_whole_rows_up_to_the_packs():
    rows = [np.zeros(1000), np.zeros(1500), np.zeros(500)]
    steps = workloads.short_steps(rows, parse("qlora short 1x2 packing"), 3)
    assert [[len(one) for one in step] for step in steps] == [[1000, 1500, 500, 1000], [1500, 500, 1000], [1500, 500, 1000]]
    assert all(sum(map(len, step)) <= 2 * workloads.PACKED_TOKENS for step in steps)


def test_a_plan_loads_each_engine_once_a_method_and_contexts_last():
    work = parse_all("qlora short 2x4,qlora 1x8192,lora 1x8192,context qlora 24")
    jobs = train.plan(["finery", "hf"], work)
    assert [(job.engine, [one.name for one in job.workloads]) for job in jobs] == [
        ("finery", ["qlora 1x8192", "qlora short 2x4"]),
        ("finery", ["lora 1x8192"]),
        ("hf", ["qlora 1x8192", "qlora short 2x4"]),
        ("hf", ["lora 1x8192"]),
        ("finery", ["context qlora 24"]),
        ("hf", ["context qlora 24"]),
    ]


def test_peers_run_an_equal_memory_workload_without_its_limit_and_once():
    jobs = train.plan(["unsloth", "finery"], parse_all("qlora 1x8192 equal-memory,qlora 1x8192"))
    assert [[one.name for one in job.workloads] for job in jobs] == [["qlora 1x8192"], ["qlora 1x8192 equal-memory", "qlora 1x8192"]]


def test_engines_that_would_mix_packed_rows_are_left_out():
    assert [job.engine for job in train.plan(["finery", "unsloth", "liger", "hf"], [parse("qlora short 2x4 packing")])] == [
        "finery",
        "unsloth",
    ]


def test_a_search_begins_where_it_is_told_and_a_peers_where_its_card_does():
    work = parse("context qlora 80 500000")
    assert (work.sequence_length, work.base.name) == (500_000, "context qlora 80")
    assert parse("context qlora 80 342733").name == "context qlora 80"


def test_loading_and_several_gpus_have_processes_of_their_own_and_peers_know_no_variants():
    work = parse_all("qlora 1x8192 deterministic,qlora 1x8192,load qlora,qlora 2x2048x8 gpus2")
    assert [(job.engine, [one.name for one in job.workloads]) for job in train.plan(["finery", "hf"], work)] == [
        ("finery", ["qlora 1x8192 deterministic", "qlora 1x8192"]),
        ("finery", ["load qlora"]),
        ("finery", ["qlora 2x2048x8 gpus1", "qlora 2x2048x8 gpus2"]),
        ("hf", ["qlora 1x8192"]),
        ("hf", ["load qlora"]),
    ]


def test_ratios_stay_within_one_run():
    rows = [row("qlora 1x8192", "finery", 300, "a"), row("qlora 1x8192", "unsloth", 200, "a"), row("qlora 1x8192", "hf", 100, "b")]
    assert baselines.ratios(rows) == [baselines.Ratio("qlora 1x8192", "unsloth", 1.5, "tok_s", "a")]


def test_an_equal_memory_row_is_compared_with_the_peers_unlimited_row():
    rows = [row("qlora 1x8192 equal-memory", "finery", 220), row("qlora 1x8192", "unsloth", 200), row("qlora 2x2048x4", "unsloth", 1)]
    assert [(ratio.peer, ratio.value) for ratio in baselines.ratios(rows)] == [("unsloth", 1.1)]


def test_contexts_are_compared_by_length():
    rows = [row("context qlora 24 90000", "finery", None, context_tokens=150), row("context qlora 24", "unsloth", 9, context_tokens=100)]
    assert [ratio.value for ratio in baselines.ratios(rows)] == [1.5]


def test_loading_is_compared_by_seconds():
    rows = [row("load qlora", "finery", None, load_s=10.0), row("load qlora", "unsloth", None, load_s=25.0)]
    assert [(ratio.value, ratio.of) for ratio in baselines.ratios(rows)] == [(2.5, "load_s")]
    assert "loaded in 10.0 s" in baselines.table(rows)


def test_our_own_ways_are_compared_with_our_own_rows():
    rows = [
        row("qlora 2x2048x4", "finery", 200),
        row("qlora 2x2048x4 deterministic", "finery", 150),
        row("qlora 2x2048x4", "hf", 100),
        row("qlora 2x2048x4 gpus1", "finery", 210),
        row("qlora 2x2048x4 gpus2", "finery", 399),
    ]
    found = {(ratio.workload, ratio.peer): ratio.value for ratio in baselines.ratios(rows)}
    assert found == {
        ("qlora 2x2048x4", "hf"): 2,
        ("qlora 2x2048x4 deterministic", "finery"): 0.75,
        ("qlora 2x2048x4 deterministic", "hf"): 1.5,
        ("qlora 2x2048x4 gpus2", "finery"): 1.9,
    }
    assert "0.75 x finery, 1.50 x hf" in baselines.table(rows)


def test_a_peers_search_that_ran_out_of_time_gives_no_ratio():
    peer = row("context qlora 24", "unsloth", 9, context_tokens=100, is_lower_bound=True)
    rows = [row("context qlora 24", "finery", 5, context_tokens=150), peer]
    assert baselines.ratios(rows) == []
    assert "≥ 100 tokens" in baselines.table(rows)


def test_a_peer_without_memory_gives_no_ratio():
    assert baselines.ratios([row("qlora 1x8192", "finery"), row("qlora 1x8192", "hf", None, error="out of memory")]) == []


def test_a_run_replaces_an_older_one_that_it_covers():
    old = [row("qlora 1x8192", "finery", 1, "a"), row("qlora 1x8192", "hf", 1, "a"), row("lora 1x8192", "hf", 1, "a")]
    new = [row("qlora 1x8192", "finery", 2, "b"), row("qlora 1x8192", "hf", 2, "b"), row("qlora 1x8192", "liger", 2, "b")]
    assert {(one.workload, one.engine, one.run_id) for one in baselines.merge(old, new)} == {
        ("lora 1x8192", "hf", "a"),
        *((one.workload, one.engine, "b") for one in new),
    }


def test_a_run_of_fewer_engines_leaves_the_comparison_of_an_older_one():
    old = [row("qlora 1x8192", "finery", 1, "a"), row("qlora 1x8192", "unsloth", 1, "a")]
    alone = baselines.merge(old, [row("qlora 1x8192", "finery", 2, "b")])
    assert sorted(one.run_id for one in alone) == ["a", "a", "b"]
    again = baselines.merge(alone, [row("qlora 1x8192", "finery", 3, "c")])
    assert sorted(one.run_id for one in again) == ["a", "a", "c"]


def test_a_runs_rows_may_come_in_parts():
    first, second = row("qlora 1x8192", "finery", 1), row("qlora 1x8192", "unsloth", 1)
    merged = baselines.merge(baselines.merge([], [first]), [second, replace(first, tok_s=2.0)])
    assert sorted((one.engine, one.tok_s) for one in merged) == [("finery", 2.0), ("unsloth", 1)]


def test_rows_are_written_and_read_back(tmp_path):
    rows = [row("qlora 1x8192", "finery", gpu="NVIDIA H200", loss=1.5, losses=[2.5, 1.5])]
    baselines.save(tmp_path / "new" / "h200.json", rows)
    assert baselines.load(tmp_path / "new" / "h200.json") == rows
    assert baselines.load(tmp_path / "missing.json") == []
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="wanted"):
        baselines.load(tmp_path / "bad.json")


def test_the_committed_baselines_can_be_read_and_printed():
    for path in baselines.FOLDER.glob("*.json"):
        rows = baselines.load(path)
        assert rows
        assert all(one.run_id and one.date and one.commit and one.command for one in rows)
        assert baselines.table(rows)


def test_a_card_has_a_file_of_its_own():
    assert [baselines.file_of(name).name for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "cpu")] == [
        "h200.json",
        "h100-80gb-hbm3.json",
        "cpu.json",
    ]


def test_the_table_marks_memory_above_the_budget():
    text = baselines.table([row("qlora 1x8192 equal-memory", "finery", peak_alloc_gib=9.0, budget_gib=8.25), row("qlora 1x8192", "hf")])
    assert "9.00 > 8.25" in text
    assert "1.00 x hf" in text


def test_the_table_has_an_estimate_beside_the_peak():
    text = baselines.table([row("qlora 1x8192", "finery", peak_alloc_gib=8.0, estimate_gib=8.4)])
    assert "8.40 (+5.0%)" in text


def test_a_workers_rows_are_told_from_its_log(capsys):
    printed = f"noise\n{PREFIX}{json.dumps({'workload': 'qlora 1x8192', 'engine': 'hf', 'tok_s': 5})}\n"
    output, log = train.Output(), io.StringIO()
    train.read_rows(iter(printed.splitlines(keepends=True)), output, log)
    assert output.rows == [Row(workload="qlora 1x8192", engine="hf", tok_s=5)]
    assert log.getvalue() == "noise\n"
    assert "qlora 1x8192: 5 tok/s" in capsys.readouterr().out


def test_the_last_success_of_a_search_counts_and_a_later_failure_does_not():
    output = train.Output()
    for one in (row("context qlora 24", "finery", context_tokens=1), row("context qlora 24", "finery", context_tokens=2)):
        output.add(one)
    output.add(row("context qlora 24", "finery", None, error="RuntimeError: a kernel is wrong"))
    output.add(row("qlora 1x8192", "finery", None, error="out of memory"))
    assert [(one.context_tokens, one.error) for one in output.rows] == [(2, None), (None, "out of memory")]


class Fake:
    """An engine whose loss is the number of the step."""

    name = "hf"
    model_dir = Path()
    probes_contexts = False

    def __init__(self):
        self.prepared, self.seen = [], []

    def prepare(self, workload):
        self.prepared.append(workload.name)

    def step(self, rows):
        self.seen.append(np.concatenate(rows))
        return float(len(self.seen))

    def release(self):
        pass


def test_warm_up_steps_are_run_and_not_counted():
    engine = Fake()
    measured = measure.fixed(engine, parse("lora 2x8x2"), num_steps=(2, 3))
    assert (measured.num_steps, measured.num_warmup_steps, measured.first_loss, measured.loss) == (3, 2, 1.0, 5.0)
    assert [len(ids) for ids in engine.seen] == [32] * 5
    assert measured.step_s is not None
    assert measured.tok_s is not None


def test_short_rows_have_no_first_loss_since_peers_log_no_single_step():
    steps = measure.Steps([1.0, 1.0], [5.0, 4.0, 3.0], 1)
    first_losses = [measure.row_of("hf", parse(name), steps, tokens_per_step=8).first_loss for name in ("qlora short 2x4", "qlora 1x8192")]
    assert first_losses == [None, 5.0]
    committed = [one for path in baselines.FOLDER.glob("*.json") for one in baselines.load(path) if " short " in one.workload]
    assert committed
    assert [one.first_loss for one in committed] == [None] * len(committed)


@pytest.mark.parametrize("limit", [1500, 30_000, 77_000, 100_000, 131_072])
def test_the_search_finds_the_longest_context(limit):
    best = measure.longest(lambda tokens: 1e-3 if tokens <= limit else None, start=78_475, budget_s=math.inf)
    assert best is not None
    assert limit * 0.96 - 1024 <= best[0] <= limit


def test_the_search_goes_no_further_than_a_spec_can():
    assert measure.longest(lambda _: 1e-3, start=900_000, budget_s=math.inf) == (workloads.LONGEST_CONTEXT, 1e-3)


def test_the_search_ends_where_nothing_fits_and_where_time_is_over():
    assert measure.longest(lambda tokens: None, start=5000, budget_s=math.inf) is None
    now, tried = [0.0], []

    def train_slowly(tokens):
        tried.append(tokens)
        now[0] += 100
        return 100.0

    assert measure.longest(train_slowly, start=8192, budget_s=250, clock=lambda: now[0]) == (8192, 100.0)
    assert tried == [8192]


def test_a_context_counts_what_does_not_fit_and_raises_what_is_wrong():
    class Small(Fake):
        def step(self, rows):
            if len(rows[0]) > 9000:
                raise RuntimeError("CUDA out of memory")
            return super().step(rows)

    reported: list[Row] = []
    found = measure.context(Small(), replace(parse("context qlora 24"), sequence_length=8192), budget_s=60, report=reported.append)
    assert all(one.is_lower_bound for one in reported)
    assert max(one.context_tokens or 0 for one in reported) == found.context_tokens
    assert found.context_tokens is not None
    assert 8192 <= found.context_tokens <= 9000
    assert found.is_lower_bound is None
    assert measure.context(Small(), replace(parse("context qlora 24"), sequence_length=4096), budget_s=0).is_lower_bound

    class Broken(Fake):
        def step(self, rows):
            raise RuntimeError("a kernel is wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        measure.context(Broken(), replace(parse("context qlora 24"), sequence_length=8192), budget_s=60)


def test_a_probed_context_has_no_speed():
    class Probing(Fake):
        probes_contexts = True

    found = measure.context(Probing(), replace(parse("context qlora 24"), sequence_length=4096), budget_s=0)
    assert (found.context_tokens, found.is_probe, found.tok_s) == (4096, True, None)
    assert "4,096 tokens in passes to their peak" in baselines.table([found])


def test_an_illegal_access_is_not_a_lack_of_memory():
    assert not measure.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert measure.is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert measure.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert measure.is_out_of_memory(ResourceExhaustedError("memory: got 1 GiB", code="out_of_memory"))


def test_the_probe_visits_the_topmost_of_all_layers_that_are_treated_alike():
    from benchmarks.finery_engine import probed_layers

    nothing, kept, hosted, more = frozenset[str](), frozenset({"o"}), frozenset({"x"}), frozenset({"x", "o"})
    plan = Plan(card=(nothing,) * 10 + (kept,) * 2, host=(more, more, more, hosted, hosted, hosted, hosted, *(nothing,) * 5))
    # 7 has a hosted layer below it; 6 is hosted; what arrives for 2 as 3 is worked on is more than for 6.
    assert sorted(probed_layers(plan)) == [2, 3, 6, 7, 8, 9, 10, 11]
    assert sorted(probed_layers(keep_all(3))) == [0, 1, 2]


def test_kernels_are_listed_by_time_with_the_busy_share():
    kernels = [kernel_profile.Kernel("small", 4, 1000.0), kernel_profile.Kernel("large", 1, 3000.0)]
    lines = kernel_profile.table(kernels, wall_s=0.008).splitlines()
    assert lines[0] == "wall 8.0 ms, kernels 4.0 ms, busy 50.0 %"
    assert [line.split()[-1] for line in lines[2:]] == ["large", "small"]
    assert "75.00%" in lines[2]


def test_more_positions_are_a_configuration_beside_linked_weights(tmp_path):
    model, links = tmp_path / "model", tmp_path / "links"
    model.mkdir()
    links.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "hidden_size": 8}))
    (model / "model.safetensors").write_text("weights")
    assert random_model.with_positions(model, num_positions=64, folder=links) == model
    assert random_model.with_positions(model, num_positions=128, folder=links) == links
    assert json.loads((links / "config.json").read_text()) == {"max_position_embeddings": 128, "hidden_size": 8}
    assert (links / "model.safetensors").read_text() == "weights"


def test_the_script_runs_by_its_path_and_refuses_nonsense(tmp_path):
    script = str(Path(train.__file__))
    command = [sys.executable, script, "bench", "--model", str(tmp_path), "--rows", "qlora nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "wanted such as" in done.stderr


def test_rows_of_a_worker_that_is_out_of_time_are_kept(capsys):
    printed = PREFIX + json.dumps({"workload": "qlora 1x8192", "engine": "hf", "tok_s": 5})
    command = [sys.executable, "-c", f"import time; print({printed!r}, flush=True); time.sleep(60)"]
    log = io.StringIO()
    assert [one.tok_s for one in train._run_worker(command, seconds=2, log=log)] == [5]
    assert "out of time" in capsys.readouterr().out


def test_a_worker_that_fails_shows_its_last_words(capsys):
    command = [sys.executable, "-c", "raise SystemExit('the model is gone')"]
    assert train._run_worker(command, seconds=30, log=io.StringIO()) == []
    assert "the model is gone" in capsys.readouterr().out


def test_a_file_of_rows_is_merged_and_printed(tmp_path, capsys):
    baselines.save(tmp_path / "new.json", [row("qlora 1x8192", "finery", 300), row("qlora 1x8192", "hf", 100)])
    assert train.main(["merge", str(tmp_path / "new.json"), "--out", str(tmp_path / "all.json")]) == 0
    assert train.main(["table", str(tmp_path / "all.json")]) == 0
    assert "3.00 x hf" in capsys.readouterr().out
    assert train.main(["merge", str(tmp_path / "missing.json")]) == 1
    assert "no rows" in capsys.readouterr().err


def test_a_spec_follows_its_workload():
    from benchmarks.finery_engine import spec_of

    quantized, full = spec_of(parse("qlora 2x2048x4 equal-memory")), spec_of(parse("fft 2x2048x2"))
    assert (quantized.quantization.value, quantized.lora.rank, quantized.memory.budget) == ("nf4", 32, str(int(7.27 * 2**30)))
    assert (quantized.batch.micro_batch_size, quantized.batch.gradient_accumulation_steps) == (2, 4)
    assert (full.method.value, full.memory.budget) == ("full", "auto")
    assert quantized.memory.host_budget_bytes is None
    emulated = spec_of(parse("context qlora 80 500000"))
    assert emulated.memory.budget == str(int((80 - workloads.RESERVED_GIB - 0.5) * 2**30))
    assert emulated.memory.host_budget_bytes == 80 * 2**30
    assert spec_of(parse("qlora 2x2048x4 deterministic")).deterministic
    assert spec_of(parse("qlora 2x2048x8 gpus2")).gpus == 2


def test_losses_are_means_of_five_steps():
    from benchmarks.trl_samples import means_of

    assert means_of([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == [3.0, 8.0]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model.make(folder, shape="tiny", tokenizer_dir=None)
    return folder


def test_what_the_engine_estimates_is_known_for_rows_of_one_length(tiny_dir):
    from benchmarks.finery_engine import estimate_gib

    fixed, longer = (estimate_gib(parse(name), tiny_dir) for name in ("lora 1x64", "context lora 24 4096"))
    assert fixed is not None
    assert longer is not None
    assert 0 < fixed < longer
    assert estimate_gib(parse("lora short 2x4"), tiny_dir) is None


def test_loading_is_timed_and_a_context_is_probed(tiny_dir):
    from benchmarks import loading
    from benchmarks.finery_engine import FineryEngine

    loaded = loading.measured("finery", parse("load lora"), tiny_dir)
    assert loaded.load_s is not None
    assert loaded.load_s > 0
    work = replace(parse("context lora 24"), sequence_length=1024)
    found = measure.context(FineryEngine(work, tiny_dir), work, budget_s=0)
    assert (found.context_tokens, found.is_probe) == (1024, True)
    assert found.loss == pytest.approx(math.log(49408), rel=0.05)


@pytest.mark.slow
def test_one_process_and_two_take_the_same_steps_in_our_own_loop(tiny_dir):
    from benchmarks.own_loop import OwnLoop

    work = parse("lora 1x16x2 gpus2")
    alone = OwnLoop(work, tiny_dir).measured(work.on_one_gpu, num_steps=(1, 2))
    together = OwnLoop(work, tiny_dir).measured(work, num_steps=(1, 2))
    assert (together.num_warmup_steps, together.num_steps) == (1, 2)
    assert (together.first_loss, together.loss) == pytest.approx((alone.first_loss, alone.loss), rel=1e-3)
