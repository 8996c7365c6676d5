"""Large tables become an Arrow file once, by one of several processes, and again after a change. So do lengths."""

import json
import logging
import multiprocessing
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny import TEXTS

from samf.data import lengths, record_cache
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.lengths import add_lengths
from samf.data.loading import load_records
from samf.data.prompts import record_prompt
from samf.data.record_cache import build_once
from samf.data.records import FEATURES
from samf.phantoms.tokenizer import train_small_tokenizer


@pytest.fixture
def root(tmp_path) -> Path:
    """A split of 50 reports, one of them empty, and 90 questions in 30 conversations."""
    folder = tmp_path / "CT-RATE"
    (folder / "radiology_text_reports").mkdir(parents=True)
    (folder / "vqa").mkdir()
    names = [f"train_{k}_a_1.nii.gz" for k in range(50)]
    lines = [f"{name},{'' if k == 3 else f'Report {k}.'}" for k, name in enumerate(names)]
    (folder / "radiology_text_reports/train_reports.csv").write_text(
        "\n".join(["VolumeName,Findings_EN", *lines]), encoding="utf-8"
    )
    asked = [("short_answer", "Is it?", "Yes."), ("multiple_choice", "Which? (a) this (b) that", "(b) that")]
    asked.append(("long_answer", "What is it?", "A chest."))
    turns = [
        turn
        for task, question, answer in asked
        for turn in ({"from": "human", "value": f"{question}<{task}>"}, {"from": "gpt", "value": answer})
    ]
    records = [{"id": f"q_{k}", "image": names[k], "conversations": turns} for k in range(30)]
    (folder / "vqa/train_vqa.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture
def always_cached(monkeypatch):
    monkeypatch.setattr(record_cache, "CACHED_FROM", 0)
    monkeypatch.setattr(record_cache, "ROWS_PER_CHUNK", 7)


def arrow_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob(record_cache.RECORDS))


def test_the_arrow_file_has_the_records_of_memory_and_is_written_once(root, tmp_path, monkeypatch, caplog):
    load = partial(load_ct_rate, root, "train", on_missing="keep", cache_dir=tmp_path / "cache")
    expected = load()
    assert not arrow_files(tmp_path) and not expected.cache_files
    assert len(expected) == 49 + 90
    monkeypatch.setattr(record_cache, "CACHED_FROM", 0)
    monkeypatch.setattr(record_cache, "ROWS_PER_CHUNK", 7)
    caplog.set_level(logging.INFO)
    caplog.clear()
    first = load()
    written = [line for line in caplog.messages if "139 records" in line or "left out" in line]
    monkeypatch.setattr(record_cache, "_write", None)  # a second writing would fail
    caplog.clear()
    second = load()
    for found in (first, second):
        assert found.features == expected.features == FEATURES
        assert found.to_list() == expected.to_list()
        assert [file["filename"] for file in found.cache_files] == list(map(str, arrow_files(tmp_path)))
    assert first._fingerprint == second._fingerprint  # so that what is made of it is known again
    again = [line for line in caplog.messages if "139 records" in line or "left out" in line]
    assert again == [line for line in written if "written" not in line] != []
    assert not list(tmp_path.rglob("*.partial"))


def test_another_table_or_option_is_another_file(root, tmp_path, always_cached):
    load = partial(load_ct_rate, root, "train", on_missing="keep", cache_dir=tmp_path / "cache")
    assert len(load()) == 139
    assert len(load(tasks=["report"])) == 49
    reports = root / "radiology_text_reports/train_reports.csv"
    reports.write_text(reports.read_text(encoding="utf-8").replace("Report 7.", ""), encoding="utf-8")
    assert len(load()) == 138
    assert len(arrow_files(tmp_path)) == 3


def test_missing_volumes_are_looked_for_each_time(root, tmp_path, always_cached, caplog):
    load = partial(load_ct_rate, root, "train", cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="50 of 50 volumes"):
        load()
    volume = root / "train_fixed/train_4/train_4_a/train_4_a_1.nii.gz"
    volume.parent.mkdir(parents=True)
    volume.touch()
    counts = tmp_path / "counts.json"
    found = load(on_missing="skip", counts_file=counts)
    assert [(record["volume"], record["task"]) for record in found] == [
        (str(volume), task) for task in ("report", "short_answer", "multiple_choice", "long_answer")
    ]
    assert len(arrow_files(tmp_path)) == 1
    saved = json.loads(counts.read_text(encoding="utf-8"))
    assert saved["split"] == "train" and saved["records"] == dict.fromkeys(
        ("report", "short_answer", "multiple_choice", "long_answer"), 1
    )
    left_out = {entry["reason"]: (entry["count"], entry["first"]) for entry in saved["left_out"]}
    assert left_out["volume file missing"][0] == 139 - 4
    assert left_out["report without text"] == (1, "train_3_a_1.nii.gz")


def test_counts_are_saved_for_tables_in_memory_and_beside_the_arrow_file(root, tmp_path, monkeypatch):
    load_records(str(root), "train", on_missing="keep", counts_file=tmp_path / "memory.json")
    monkeypatch.setattr(record_cache, "CACHED_FROM", 0)
    load_records(str(root), "train", on_missing="keep", cache_dir=tmp_path / "cache")
    (beside,) = tmp_path.rglob(record_cache.COUNTS)
    assert json.loads(beside.read_text(encoding="utf-8")) == json.loads((tmp_path / "memory.json").read_text("utf-8"))
    assert json.loads(beside.read_text(encoding="utf-8"))["records"]["report"] == 49


def test_a_reading_that_fails_leaves_nothing(root, tmp_path, always_cached):
    vqa = root / "vqa/train_vqa.json"
    whole = vqa.read_text(encoding="utf-8")
    vqa.write_text(whole[:-20], encoding="utf-8")
    load = partial(load_ct_rate, root, "train", on_missing="keep", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"train_vqa.json: record 29 is broken or cut off"):
        load()
    assert not arrow_files(tmp_path) and not list(tmp_path.rglob("*.partial"))
    vqa.write_text(whole, encoding="utf-8")
    assert len(load()) == 139


def _build(path: Path, start, log: Path) -> None:
    def build(partial: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        partial.write_text("whole", encoding="utf-8")

    start.wait()
    build_once(path, build)
    assert path.read_text(encoding="utf-8") == "whole"


def test_one_of_several_processes_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [
        context.Process(target=_build, args=(tmp_path / "x" / "file", start, tmp_path / "log")) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_each_text_alone_and_are_kept(root, tmp_path, monkeypatch):
    tokenizer = train_small_tokenizer(TEXTS, 400)
    records = load_records(str(root), "train", on_missing="keep")
    expected = [len(tokenizer(f"{record_prompt(r)} {r['answer']}")["input_ids"]) for r in records]
    assert len(set(expected)) > 3
    assert add_lengths(records, tokenizer, tmp_path)["length"][:] == expected
    assert not list(tmp_path.rglob("*.npy"))

    monkeypatch.setattr(lengths, "CACHED_FROM", 0)
    monkeypatch.setattr(lengths, "_BATCH", 13)
    assert add_lengths(records, tokenizer, tmp_path)["length"][:] == expected
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)  # leaves its mark on a fast tokenizer
    count_tokens = lengths.count_tokens
    monkeypatch.setattr(lengths, "count_tokens", None)  # a second counting would fail
    again = add_lengths(records, tokenizer, tmp_path)
    assert again["length"][:] == expected and again.column_names == [*records.column_names, "length"]

    monkeypatch.setattr(lengths, "count_tokens", count_tokens)
    few = records.select([5, 2])
    assert add_lengths(few, tokenizer, tmp_path)["length"][:] == [expected[5], expected[2]]
    other = train_small_tokenizer(TEXTS[:1], 300)
    found = np.array(add_lengths(records, other, tmp_path)["length"])
    assert (found != expected).any()
    assert isinstance(again, datasets.Dataset)
