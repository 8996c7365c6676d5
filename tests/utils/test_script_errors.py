"""Scripts end with one line where an option or the data can't be used."""

import importlib

import pytest

from samf.utils.script_errors import input_errors

OUTPUT = ["--output_dir", "out", "--report_to", "none", "--use_cpu", "true"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train", ["--no_such_option", "1"], "no_such_option"),
        ("warmup_aggregator", ["--no_such_option", "1"], "no_such_option"),
        ("pretrain_encoder", ["--no_such_option", "1"], "no_such_option"),
        ("pretrain_encoder", ["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_option_or_folder_is_one_line(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as ended:
        importlib.import_module(f"samf.{script}").main([*OUTPUT, *arguments])
    assert str(ended.value).startswith(f"{script}.py: ") and "\n" not in str(ended.value)


def test_only_errors_about_input_end_a_script():
    with pytest.raises(SystemExit, match=r"^a\.py: first second$"), input_errors("a.py"):
        raise ValueError("first\n  second")
    with pytest.raises(KeyError), input_errors("a.py"):
        raise KeyError("a mistake in the code")
