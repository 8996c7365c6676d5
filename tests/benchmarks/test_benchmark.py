"""benchmark.py: statistics, limits, what the lines compare, and the JSON; no timing is judged."""

import importlib.util
import json
import statistics
import subprocess
import zlib

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samf import SamfForConditionalGeneration, SamfModel
from samf.benchmarks import (
    llama_cpp_lines,
    memory_lines,
    quantized_lines,
    speed_lines,
    stream_lines,
    volume_lines,
    workloads,
)
from samf.benchmarks import runner as benchmark
from samf.benchmarks.measuring import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    Measurement,
    Stopwatch,
    ratios,
    resident,
    summarise,
)
from samf.model.ct_volume import CTVolume, read_ct
from samf.training.memory import peak_resident

CPU = torch.device("cpu")


def settings(folder=None, size="tiny", device=CPU, dtype=torch.float32):
    return workloads.Settings(size, device, dtype, budget=0.01, folder=folder)


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def task(self, name, seconds):
        def run():
            self.now += seconds
            self.order.append(name)

        return run

    def __call__(self):
        return self.now


def test_summary_holds_median_quartiles_and_extremes():
    values = [7.0, 1.0, 3.0, 5.0, 100.0]
    found = summarise(values)
    assert found["median"] == statistics.median(values) == 5
    assert (found["first_quartile"], found["third_quartile"]) == (3, 7)  # of 1 3 5 7 100
    assert (found["minimum"], found["maximum"], found["repeats"]) == (1, 100, 5)
    assert summarise([2.0]) == dict.fromkeys(found, 2.0) | {"repeats": 1}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_refuses_what_is_no_measurement(values):
    with pytest.raises(ValueError, match="finite values"):
        summarise(values)


@pytest.mark.parametrize(
    ("values", "at_least", "at_most", "passed"),
    [
        ([7.9, 8.0, 9.0], 8.0, None, True),
        ([7.0, 7.9, 90.0], 8.0, None, False),
        ([1.0, 1.5, 9.0], None, 1.5, True),
        ([1.0, 1.6, 1.7], None, 1.5, False),
        ([1.0, 2.0, 3.0], 1.0, 2.0, True),
        ([0.5], 1.0, 2.0, False),
        ([3.0], 1.0, 2.0, False),
        ([1.0], None, None, None),
    ],
)
def test_the_median_decides_about_a_limit(values, at_least, at_most, passed):
    summary = Measurement("ratio", "x", values, at_least, at_most=at_most).summary()
    assert summary["passed"] is passed
    assert (summary["at_least"], summary["at_most"]) == (at_least, at_most)


def test_a_missed_limit_of_numpys_numbers_can_be_written():
    summary = Measurement("memory", "x", [np.float64(3) / np.int64(2)], at_most=1.2).summary()
    assert json.loads(json.dumps(summary))["passed"] is False


def test_limits_hold_at_full_size_where_they_are_stated():
    gpu = torch.device("cuda")
    assert settings(size="full").limit(8) == 8
    assert settings(size="full").limit(8, on=("cuda",)) is None
    assert settings(size="full", device=gpu).limit(8, on=("cuda",)) == 8
    assert settings(size="tiny", device=gpu).limit(8) is None


def test_tasks_take_turns_and_each_round_turns_the_order():
    clock = Clock()
    watch = Stopwatch(CPU, budget=20.0, clock=clock)
    times = watch.in_turns({"a": clock.task("a", 2.0), "b": clock.task("b", 3.0)}, "turns")
    assert times == {"a": [2.0] * 4, "b": [3.0] * 4}  # 4 rounds of 5 s fit 20 s
    assert "".join(clock.order) == "ab" + "abbaabba"  # a warm-up first


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, FEWEST_ROUNDS), (1e9, MOST_ROUNDS)])
def test_rounds_have_bounds(budget, rounds):
    clock = Clock()
    assert len(Stopwatch(CPU, budget, clock).in_turns({"a": clock.task("a", 2.0)}, "bounds")["a"]) == rounds


def test_a_stage_may_ask_for_more_rounds():
    clock = Clock()
    assert len(Stopwatch(CPU, 0.0, clock).in_turns({"a": clock.task("a", 2.0)}, "five", fewest=5)["a"]) == 5


def test_memory_that_is_held_shows_and_its_peak_stays():
    before = resident()
    block = np.ones(50_000_000, dtype=np.uint8)
    grown = resident() - before
    del block
    assert 40_000_000 < grown < 80_000_000
    assert peak_resident() > before + grown - 1_000_000  # the system counts in batches


def test_a_quick_task_is_called_until_the_clock_can_tell():
    clock = Clock()
    times = Stopwatch(CPU, 0.0, clock).in_turns({"a": clock.task("a", 0.01)}, "quick")
    assert times["a"] == pytest.approx([0.01] * FEWEST_ROUNDS)
    assert len(clock.order) == 2 + 5 * FEWEST_ROUNDS  # two to warm up; five fill a sample of 0.05 s


def test_ratios_go_round_by_round():
    assert ratios([8.0, 30.0], [4.0, 10.0]) == [2.0, 3.0]


def test_vit_flops_are_those_that_torch_counts():
    given = settings()
    config = given.config()
    config.vision_config._attn_implementation = "eager"  # the counter knows matrix products
    model = workloads.random_model(SamfModel, config, CPU, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_slices(workloads.slice_stack(given, 2, 3))
    assert speed_lines.vit_flops(config.vision_config, 6) == counter.get_total_flops()


def test_vit_b16_at_224_pixels_takes_its_known_operations():
    """17.5 thousand million multiplications and additions, two operations each."""
    flops = speed_lines.vit_flops(settings(size="full").config().vision_config, 1)
    assert flops == pytest.approx(2 * 17.56e9, rel=0.01)


def test_equal_rows_give_the_fused_vector():
    torch.manual_seed(0)
    config = settings().config(fusion_type="ao2d")
    fusion = workloads.random_model(SamfModel, config, CPU, torch.float32).fusion
    workloads.fill(fusion, std=0.3)
    dim = config.text_config.hidden_size
    given = (
        torch.randn(2, 6, config.vision_config.hidden_size),
        torch.randn(2, config.volume_dim),
        torch.randn(2, 5, dim),
        torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
        torch.tensor([[True] * 5, [False] * 2 + [True] * 3]),
    )
    with torch.no_grad():
        fused, rows = fusion(*given)[0], speed_lines.repeated_fusion(fusion, *given, repeats=7)
    assert rows.shape == (2, 7, dim)
    torch.testing.assert_close(rows, fused.expand_as(rows), rtol=1e-5, atol=1e-5)


def test_random_weights_are_whole_and_the_same_each_time():
    models = [
        workloads.random_model(SamfForConditionalGeneration, settings().config(), CPU, torch.bfloat16) for _ in range(2)
    ]
    for name, weight in models[0].named_parameters():
        assert weight.dtype == torch.bfloat16 and weight.isfinite().all(), name
        assert weight.ndim == 1 or 0.01 < weight.float().std() < 0.03, name
    assert not models[0].training
    sums = [workloads.checksums(model) for model in models]
    assert sums[0] == sums[1]
    with torch.no_grad():
        models[1].lm_head.weight[3, 4] += 0.5
    assert [name for name, value in workloads.checksums(models[1]).items() if value != sums[0][name]] == [
        "lm_head.weight"
    ]


def test_a_batch_is_left_padded_and_its_volumes_differ():
    given = settings()
    batch, config = workloads.conversation_batch(given, rows=3, prompt=8), given.config()
    padding = batch["attention_mask"] == 0
    assert padding.sum(1).tolist() == [0, 1, 2]
    assert (padding.int().diff(dim=1) <= 0).all()  # once a token is kept, so is every later one
    assert ((batch["input_ids"] == config.image_token_id).sum(1) == config.num_image_tokens).all()
    assert (batch["input_ids"][padding] == config.text_config.pad_token_id).all()
    assert batch["slice_mask"].sum(1).tolist() == [3, 3, 2]


def test_parameters_are_counted_part_by_part():
    figures = {figure.name: figure.values[0] for figure in speed_lines.count_parameters(settings())}
    model = SamfForConditionalGeneration(settings().config())
    assert figures.pop("whole model") == pytest.approx(model.num_parameters() / 1e6)
    assert sum(figures.values()) == pytest.approx(model.num_parameters() / 1e6)
    assert set(figures) == {"slice encoder", "positions", "aggregator", "fusion", "language model", "head"}


SLOW_LINES = (
    *("train_compiled", "dicom", "formats", "start", "batches", "answers", "scoring"),
    *("cluster", "remote", "streaming"),
)
ALL_LINES = [(command, line) for command, lines in benchmark.LINES.items() for line in lines if line != "parameters"]


@pytest.mark.parametrize(
    ("command", "line"),
    [pytest.param(*line, marks=[pytest.mark.slow] if line[1] in SLOW_LINES else []) for line in ALL_LINES],
)
def test_every_line_runs(command, line, tmp_path):
    """Each stage in turn, in this process; what it asserts itself (equal weights, answers, results) holds."""
    for stage in benchmark.LINES[command][line]:
        if stage.startswith("8bit") and importlib.util.find_spec("torchao") is None:
            continue
        if stage.startswith("llama_cpp") and not all(map(importlib.util.find_spec, llama_cpp_lines.PACKAGES)):
            continue
        if line == "streaming" and not all(map(importlib.util.find_spec, stream_lines.PACKAGES)):
            pytest.skip("pip install 'moto[server]' s3fs")
        args = benchmark.parse_args(
            [command, "--size=tiny", "--budget=0.01", f"--stage={line}/{stage}", f"--folder={tmp_path}"]
        )
        result = benchmark.run_stage(args)
        if stage == "train_liger" and not torch.cuda.is_available():
            assert "GPU" in result["skipped"]
            continue
        assert all(figure["passed"] is None for figure in result["figures"])  # no limit at this size
        assert result["figures"][-1]["name"] == "peak resident memory"
        json.dumps(result)


def test_eight_bits_without_torchao_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = benchmark.parse_args(["model", "--size=tiny", "--stage=save/8bit_reload", f"--folder={tmp_path}"])
    assert "pip install torchao" in benchmark.run_stage(args)["skipped"]


def test_reload_notices_a_weight_that_changed(tmp_path):
    memory_lines.save_model(settings(tmp_path))
    sums = json.loads((tmp_path / "checksums.json").read_text(encoding="utf-8"))
    sums["lm_head.weight"] += 1
    (tmp_path / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    with pytest.raises(RuntimeError, match="lm_head.weight"):
        memory_lines.reload_model(settings(tmp_path))


def test_formats_are_compared_round_by_round(tmp_path):
    """Decoding, prefill, and the share of what the fastest read of the memory allows."""
    speeds = {
        "float32": [(1.0, 20.0, 4e9, 4e9), (2.0, 20.0, 3e9, 4e9)],
        "bfloat16": [(2.0, 40.0, 4e9, 2e9), (4.0, 60.0, 4e9, 2e9)],
        "int8": [(3.0, 40.0, 4e9, 1e9), (6.0, 60.0, 4e9, 1e9)],
        "int4": [(6.0, 50.0, 10e9, 5e8), (18.0, 70.0, 4e9, 5e8)],
    }
    keys = ("decode", "prefill", "memory", "bytes")
    kept = {name: [dict(zip(keys, turn, strict=True)) for turn in turns] for name, turns in speeds.items()}
    (tmp_path / "speeds.json").write_text(json.dumps(kept), encoding="utf-8")
    found = {figure.name: list(figure.values) for figure in quantized_lines.compare(settings(tmp_path))}
    assert found["decode, int4 / float32"] == [6.0, 9.0]
    assert found["prefill, int4 / float32"] == [2.5, 3.5]
    assert found["decode, int4, of the memory's speed"] == pytest.approx([30.0, 90.0])  # of 10e9 / 5e8 = 20 tokens/s


def test_a_format_that_was_not_measured_is_not_compared(tmp_path):
    with pytest.raises(workloads.LineSkipped, match="float32, bfloat16, int8, int4"):
        quantized_lines.compare(settings(tmp_path))


def test_a_step_reads_the_weights_of_its_linear_layers_and_the_cache():
    model = workloads.random_model(SamfForConditionalGeneration, settings().config(), CPU, torch.float32)
    width, inner, vocabulary, layers, length = 32, 64, 128, 2, 10
    weights = layers * (4 * width * width + 3 * width * inner) + width * vocabulary
    assert quantized_lines.bytes_per_token(model, length) == 4 * (weights + 2 * layers * width * length)


def test_quantised_weights_must_be_the_language_models_alone():
    model = workloads.random_model(SamfForConditionalGeneration, settings().config(), CPU, torch.float32)
    with pytest.raises(RuntimeError, match=r"model\.language_model\.layers\.0.* is not quantised"):
        memory_lines.quantised_weights(model)


@pytest.fixture
def results(monkeypatch):
    """run_lines on children that don't run: one has figures, one fails, one is skipped."""
    outcomes = {
        "parameters/parameters": {"figures": [Measurement("head", "million", [98.5], note="counted").summary()]},
        "fusion/fusion": {"figures": [Measurement("equal rows / once", "x", [7.0, 9.0, 9.5], 8.0).summary()]},
        "save/save": {"figures": [], "error": "save failed (exit status 1)"},
        "save/8bit": {"figures": [], "skipped": "needs torchao"},
    }

    def run(lines):
        monkeypatch.setattr(
            benchmark, "run_child", lambda args, stage, folder: {"seconds": 1.0, **outcomes.get(stage, {"figures": []})}
        )
        return benchmark.run_lines(benchmark.parse_args(["model", "--size=tiny", f"--lines={lines}"]))

    return run


def test_json_states_machine_versions_and_figures(results, tmp_path):
    found = results("parameters,fusion")
    benchmark.write_json(tmp_path / "out.json", found)
    read = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert read == found and read["passed"] is True
    assert (read["command"], read["size"], read["device"], read["dtype"]) == ("model", "tiny", "cpu", "float32")
    assert {"cpu", "cores", "threads", "memory_gb", "system"} <= read["machine"].keys()
    assert read["versions"]["torch"]
    assert {"python", "torch", "transformers"} <= read["versions"].keys()
    assert [(stage["line"], stage["stage"]) for stage in read["stages"]] == [
        ("parameters", "parameters"),
        ("fusion", "fusion"),
    ]
    assert read["stages"][1]["figures"][0] == {
        "name": "equal rows / once",
        "unit": "x",
        "median": 9.0,
        "first_quartile": 8.0,
        "third_quartile": 9.25,
        "minimum": 7.0,
        "maximum": 9.5,
        "repeats": 3,
        "at_least": 8.0,
        "at_most": None,
        "passed": True,
        "note": "",
    }


def test_a_failed_stage_fails_the_whole_and_a_skipped_one_does_not(results):
    found = results("save")
    assert found["passed"] is False
    lines = benchmark.table(found).splitlines()
    assert "FAILED" in lines[2] and "exit status 1" in lines[2]
    assert any("skipped" in line and "needs torchao" in line for line in lines)


def test_table_shows_verdict_spread_and_limit(results):
    lines = benchmark.table(results("parameters,fusion")).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["fusion", "equal rows / once", "9 x", "8 to 9.25", "3", ">= 8", "pass", ""]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "torch" in lines[-1] and "threads" in lines[-1]


def test_table_shows_an_upper_limit(monkeypatch):
    figure = Measurement("slices / unpacking", "x", [1.25], at_most=1.5).summary()
    monkeypatch.setattr(benchmark, "run_child", lambda args, stage, folder: {"seconds": 1.0, "figures": [figure]})
    lines = benchmark.table(benchmark.run_lines(benchmark.parse_args(["volumes", "--size=tiny"]))).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["scan", "slices / unpacking", "1.25 x", "", "1", "<= 1.5", "pass", ""]


def test_a_missed_limit_shows_and_sets_the_exit_status(monkeypatch, capsys):
    missed = {"seconds": 1.0, "figures": [Measurement("ratio", "x", [2.0], 8.0).summary()]}
    monkeypatch.setattr(benchmark, "run_child", lambda args, stage, folder: missed)
    assert benchmark.main(["model", "--lines=fusion"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_a_stage_runs_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "figures.json"
    assert benchmark.main(["model", "--size=tiny", "--lines=parameters", "--threads=1", f"--json={output}"]) == 0
    (stage,) = json.loads(output.read_text(encoding="utf-8"))["stages"]
    assert stage["seconds"] > 0 and stage["machine"]["threads"] == 1
    assert {figure["name"] for figure in stage["figures"]} >= {"whole model", "peak resident memory"}


@pytest.mark.parametrize(("status", "reason"), [(1, "failed"), (-9, "lack of memory")])
def test_a_child_that_dies_is_reported(status, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, status))
    result = benchmark.run_child(benchmark.parse_args(["model", "--size=tiny"]), "save/save", tmp_path)
    assert result["figures"] == []
    assert reason in result["error"] and f"exit status {status}" in result["error"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--lines=vit,speed", "speed"), ("--lines=", "lines are"), ("--size=huge", "huge"), ("--device=cuda", "no GPU")],
)
def test_arguments_that_cannot_be_used_say_so(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse_args(["model", argument])
    assert message in capsys.readouterr().err


def test_device_chooses_the_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arguments, device, dtype in (
        ([], "cpu", torch.float32),
        (["--device=cuda"], "cuda", torch.bfloat16),
        (["--device=cuda:1", "--dtype=float16"], "cuda:1", torch.float16),
    ):
        args = benchmark.parse_args(["model", *arguments])
        assert (args.device, args.dtype) == (torch.device(device), dtype)


def test_weights_that_do_not_fit_are_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "free_memory", lambda device: 1e5)
    args = benchmark.parse_args(["model", "--size=tiny", "--stage=decode/decode", f"--folder={tmp_path}"])
    assert "GB are free" in benchmark.run_stage(args)["skipped"]
    assert benchmark.run_stage(benchmark.parse_args(["model", "--size=tiny", "--stage=parameters/parameters"]))[
        "figures"
    ]


def test_an_enlarged_scan_keeps_its_voxels_places_and_noise():
    """Every value is one of the source's from next to its place, and gzip finds less to save than in repeated rows."""
    rng = np.random.default_rng(3)
    ramp = np.add.outer(np.add.outer(np.arange(20) * 10, np.arange(24) * 400), np.zeros(4))
    hu = (ramp + rng.integers(0, 10, ramp.shape)).astype(np.int16)
    volume = CTVolume(hu, (1.0, 1.0, 1.0), np.eye(4), "test")
    large = volume_lines.enlarge(volume, (50, 60, 8))
    assert large.shape == (50, 60, 8) and large.dtype == np.int16
    x, y = np.indices((50, 60)) + 0.5
    expected = (x * 20 / 50 - 0.5) * 10 + (y * 24 / 60 - 0.5) * 400
    error = (large.mean(axis=2) - expected)[3:-3, 3:-3]
    assert np.abs(error).max() < 450 and abs(error.mean()) < 30
    np.testing.assert_array_equal(volume_lines.enlarge(volume, hu.shape), hu)
    repeated = hu[np.arange(50)[:, None] * 20 // 50, np.arange(60) * 24 // 60]
    packed = [len(zlib.compress(array[..., 0].tobytes(order="F"))) for array in (repeated, large)]
    assert packed[1] > 1.5 * packed[0]


def test_the_scan_has_its_shape_and_the_sources_field(tmp_path):
    given = settings(tmp_path)
    volume, source = read_ct(volume_lines.scan_file(given)), volume_lines.find_source(given)
    assert volume.shape == volume_lines.SHAPES["tiny"]
    field, expected = (np.array(v.shape) * v.spacing for v in (volume, source))
    np.testing.assert_allclose(field, expected, rtol=1e-4)


def test_the_reference_implementation_casts_and_scales_as_its_preset(tmp_path):
    """Its slices are the preset's, but for the part of the picture that the preset cuts off."""
    path = volume_lines.scan_file(settings(tmp_path))
    found = volume_lines.reference_slices(path)
    assert found.shape == (24, 224, 224) and found.dtype == np.uint8
    stored = read_ct(path).stored_hu()
    middle = stored[:, :, np.linspace(0, 29, 24).astype(int)].astype(
        np.uint8
    )  # all 30 slices lie within 72 of the middle
    np.testing.assert_allclose(found.mean(axis=(1, 2)), middle.mean(axis=(0, 1)), atol=6)


def test_unpacking_reads_the_whole_file(tmp_path):
    path = volume_lines.scan_file(settings(tmp_path))
    volume_lines.unpack(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EOFError):
        volume_lines.unpack(path)
