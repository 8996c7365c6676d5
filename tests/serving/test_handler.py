"""handler.py, loaded as Inference Endpoints' toolkit loads it: a lone module next to the model."""

import ast
import base64
import importlib.util
import json
import shutil
import sys
import zipfile

import pytest

from samf.utils.packaged import DEMO_MODEL, HANDLER


@pytest.fixture(scope="module")
def repository(reporter, tmp_path_factory):
    """The demo model as a pushed repository: with its code and the handler."""
    folder = tmp_path_factory.mktemp("repository")
    reporter.save_pretrained(folder)
    shutil.copyfile(HANDLER, folder / "handler.py")
    return folder


@pytest.fixture(scope="module")
def handler(repository):
    """As huggingface_inference_toolkit.utils.check_and_register_custom_pipeline_from_directory does."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", repository / "handler.py")
    sys.path.insert(0, str(repository))
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules["handler.EndpointHandler"] = module
        spec.loader.exec_module(module)
        yield module.EndpointHandler(str(repository))
    finally:
        sys.path.remove(str(repository))
        sys.modules.pop("handler.EndpointHandler", None)


def test_reports_and_answers_from_base64_and_from_bytes(handler, reporter, scans, temporary):
    content = (scans / "ill.nii.gz").read_bytes()
    own = reporter(scans / "ill.nii.gz", max_new_tokens=40).to_dict()
    data = base64.b64encode(content).decode()
    for inputs in (content, data, {"volume": data}):
        found = json.loads(json.dumps(handler({"inputs": inputs, "parameters": {"max_new_tokens": 40}})))
        assert found["text"] == own["text"] and found["findings"] == pytest.approx(own["findings"])
        assert found["provenance"]["source"] == "upload" and str(temporary) not in json.dumps(found)
    question = "Is there a pleural effusion?"
    answer = handler({"inputs": {"volume": data, "question": question}, "parameters": {"max_new_tokens": 4}})
    assert answer["question"] == question and answer["truncated"]


def test_a_zip_of_files_is_read(handler, scans, tmp_path, temporary):
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        archive.write(scans / "healthy.nii.gz", "JANE DOE.nii.gz")
    found = handler({"inputs": (tmp_path / "scan.zip").read_bytes(), "parameters": {"max_new_tokens": 3}})
    assert found["text"] and "JANE" not in json.dumps(found)


@pytest.mark.parametrize(
    "data",
    [
        {"inputs": ""},
        {"inputs": {"volume": "####"}},
        {"inputs": {}},
        {"inputs": [1]},
        {"inputs": b"no scan" * 50},
        {"inputs": b"no scan", "parameters": {"max_length": 3}},
        {"inputs": {"volume": "QUJD", "question": 5}},
        {"inputs": b"\x1f\x8b" + bytes(500)},
    ],
)
def test_errors_say_what_is_wrong_and_name_no_path(handler, data, temporary):
    with pytest.raises(ValueError) as caught:
        handler(data)
    assert str(caught.value) and str(temporary) not in str(caught.value) and caught.value.__cause__ is None


def test_it_needs_nothing_but_what_a_repository_has():
    """No module of this package, and no relative import, which a lone module can't have."""
    imports = [
        node for node in ast.walk(ast.parse(HANDLER.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and (node.level or "samf" in node.module)]
    assert not [alias for node in imports for alias in node.names if "samf" in alias.name]


def test_it_is_no_part_of_what_is_saved(repository, reporter, tmp_path):
    assert not (DEMO_MODEL / "handler.py").exists()
    reporter.save_pretrained(tmp_path / "saved")
    assert {path.name for path in repository.iterdir()} - {path.name for path in (tmp_path / "saved").iterdir()} == {
        "handler.py",
    }
