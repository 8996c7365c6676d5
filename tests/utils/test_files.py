"""Files and folders appear whole under their names, or not at all."""

import json
import os
import stat

import pytest

from samf.utils.files import atomic_folder, atomic_path, atomic_write, write_json


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(("content", "expected"), [("Ä\n", b"\xc3\x84\n"), (b"\x00\xff", b"\x00\xff")])
def test_a_text_or_bytes_replace_what_was_there(tmp_path, content, expected):
    path = tmp_path / "below" / "file"
    for _ in range(2):
        atomic_write(path, content)
        assert path.read_bytes() == expected and names(path.parent) == ["file"]


def test_json_is_indented_utf_8(tmp_path):
    write_json(tmp_path / "a.json", {"b": "Ä", "a": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": "Ä",\n  "a": [\n    1\n  ]\n}\n' and json.loads(text) == {"b": "Ä", "a": [1]}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        assert temporary.parent == path.parent and path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_several_writers_of_a_file_have_temporary_names_of_their_own(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and names(tmp_path) == ["file"]  # the one that ended last


def test_a_new_file_has_the_umasks_permissions(tmp_path):
    """Another user of a shared cache must be able to read it."""
    before = os.umask(0o022)
    try:
        atomic_write(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with atomic_folder(folder) as temporary:
        (temporary / "weights").touch()
        assert names(folder) == []
    assert names(folder) == ["weights"] and names(tmp_path) == ["model"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "of a killed run").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as temporary:
        assert names(temporary) == []
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_folder_with_files_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    with pytest.raises(OSError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "other").touch()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["weights"]
