"""The check by loading back: fresh processes that get everything from a stand-in of the Hub."""

import hashlib
import os
import subprocess
import sys

import pytest
from hub_stand_in import USER

from samf.scripts.push_model import PushOptions, push_collection, push_folder
from samf.sharing.errors import CheckError
from samf.sharing.hub import Target
from samf.sharing.load_back import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = f"{USER}/samf"


@pytest.mark.parametrize("check", ["load", "full"])
def test_every_form_loads_from_the_hub(adapter, hub, check):
    lines = []
    push_collection([adapter], Target(NAME), PushOptions(check, say=lines.append), hub.api())
    said = [line for line in lines if "in a fresh process" in line]
    assert len(said) == 4 and all("SamfForConditionalGeneration" in line for line in said)
    assert all(("same logits as here" in line) == (check == "full") for line in said)
    asked = hub.count(r"GET /someone/samf/resolve/[0-9a-f]{40}/modeling_samf.py")
    assert asked and not hub.count(r"GET /someone/[\w-]+/resolve/main/(?!README)")
    assert bool(hub.count("GET /storage/")) or check == "load"


def _break_code(files, path):
    files[path] = b"raise RuntimeError('not the code that was pushed')\n"


def test_code_that_doesn_t_run_elsewhere_fails_the_check(model, hub, corrupt, monkeypatch):
    corrupt("configuration_samf.py", _break_code)
    monkeypatch.setattr("samf.scripts.push_model.check_files", lambda *arguments: 0)
    with pytest.raises(
        CheckError, match="pushed, but doesn't load in a fresh process: RuntimeError: not the code"
    ) as error:
        push_folder(model, Target(NAME), PushOptions("load"), hub.api())
    assert hub.repositories[NAME].oid("main") in str(error.value)


def test_other_weights_fail_the_full_check(model, hub, corrupt, monkeypatch):
    """Where checksums say nothing: one number of the last shard."""
    shard = sorted(model.glob("model*.safetensors"))[-1].name

    def change(files, path):
        files[path] = files[path][:-2] + b"\x41\x41"  # 12 or more, as float32
        hub.lfs_objects[hashlib.sha256(files[path]).hexdigest()] = files[path]

    corrupt(shard, change)
    monkeypatch.setattr("samf.scripts.push_model.check_files", lambda *arguments: 0)
    with pytest.raises(CheckError, match="gives other results"):
        push_folder(model, Target(NAME), PushOptions("full"), hub.api())


def test_the_command_ends_with_1_where_the_check_fails_and_with_2_where_nothing_can_be_pushed(model, hub, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def push(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        code = "import sys; sys.argv[0] = 'samf'; from samf.cli.main import app; app()"
        command = [sys.executable, "-c", code, "push", *arguments]
        return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)

    done = push(str(model), NAME, "--private", "--gated", "auto", "--tag", "v1", "--message", "first")
    revision = hub.repositories[NAME].oid("main")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{hub.url}/{NAME}/commit/{revision}"
    assert f"{NAME} at {revision}: " in done.stdout and "load in a fresh process" in done.stdout
    assert hub.history(NAME)[-1][1] == "first" and hub.repositories[NAME].tags == {"v1": revision}
    hub.fail("GET .*/tree/[0-9a-f]{40}", answer=429)
    broken = push(str(model), NAME)
    assert broken.returncode == 1 and broken.stderr.splitlines()[-1].startswith(f"samf: {NAME}: too many requests")
    for arguments, variables in (
        ([str(tmp_path / "none"), NAME], {}),
        ([str(model), NAME, "--public"], {}),
        ([str(model), str(model), NAME], {}),
        ([str(model), NAME], {"HF_TOKEN": "hf_" + "0" * 34}),
    ):
        done = push(*arguments, **variables)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("samf: ")


def test_what_the_process_runs_needs_no_package():
    assert main.__module__ == "samf.sharing.load_back"
    with open(sys.modules[main.__module__].__file__, encoding="utf-8") as file:
        assert "from samf" not in file.read()
