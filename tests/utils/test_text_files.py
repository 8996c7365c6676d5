"""Text files in the encodings that Excel, PowerShell and Notepad write."""

import json

import pytest

from samf.utils.text_files import TextEncodingError, decode_text, open_csv, open_text, read_json, read_lines, read_text

TEXT = "Müller – no nodule > 5 µm"
MARKED = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_says_how_a_text_is_read(tmp_path, encoding):
    file = tmp_path / "file"
    file.write_bytes(f"{TEXT}\r\nsecond\u2028line\r\n".encode(encoding))
    assert read_text(file) == f"{TEXT}\nsecond\u2028line\n"
    assert read_lines(file) == [TEXT, "second\u2028line"]
    with open_text(file) as stream:
        assert list(stream) == [f"{TEXT}\n", "second\u2028line\n"]
    file.write_bytes(json.dumps({"text": TEXT}, ensure_ascii=False).encode(encoding))
    assert read_json(file) == {"text": TEXT}


def test_big_endian_marks_are_read_too():
    for mark, encoding in ((b"\xfe\xff", "utf-16-be"), (b"\x00\x00\xfe\xff", "utf-32-be")):
        assert decode_text(mark + TEXT.encode(encoding), "file") == TEXT


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_are_read_with_the_delimiter_of_their_header(tmp_path, encoding, delimiter):
    file = tmp_path / "table.csv"
    quoted = f'"a{delimiter} quoted"'
    file.write_bytes(f'name{delimiter}"Findings, free"\r\n{TEXT}{delimiter}{quoted}\r\n'.encode(encoding))
    with open_csv(file) as rows:
        assert list(rows) == [{"name": TEXT, "Findings, free": f"a{delimiter} quoted"}]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("cp1252", ("line 2", "0xfc", "Windows-1252", "iconv -f WINDOWS-1252 -t UTF-8")),
        ("utf-16-le", ("UTF-16LE without a byte order mark", "iconv -f UTF-16LE")),
        ("utf-16-be", ("UTF-16BE without a byte order mark", "iconv -f UTF-16BE")),
    ],
)
def test_other_encodings_are_refused_with_file_place_and_remedy(tmp_path, encoding, words):
    file = tmp_path / "table.csv"
    file.write_bytes(f"name,text\n{TEXT},x\n".encode(encoding))

    def stream_all():
        with open_csv(file) as rows:
            list(rows)

    for read in (lambda: read_text(file), stream_all):
        with pytest.raises(TextEncodingError) as error:
            read()
        for word in (str(file), "UTF-8", *words):
            assert word in str(error.value)


def test_a_late_byte_is_named_by_its_line_in_the_file(tmp_path):
    """A stream is decoded in chunks, whose errors count from the chunk."""
    file = tmp_path / "long.txt"
    file.write_bytes(b"line\n" * 50_000 + b"\xb5\n")
    with pytest.raises(TextEncodingError, match="0xb5 in line 50001"), open_text(file) as stream:
        list(stream)


def test_a_cut_utf_16_file_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "cut.txt"
    file.write_bytes(TEXT.encode("utf-16")[:-1])
    with pytest.raises(TextEncodingError, match=r"cut.txt: begins with the byte order mark of UTF-16"):
        read_text(file)


def test_broken_json_names_its_file(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.json: not valid JSON"):
        read_json(file)
