"""Two launchers of two processes each meet as two machines would; one process is killed, and torchrun starts all again."""

import socket
import subprocess

import psutil
import pytest
from launch import REPOSITORY, flags
from launchers.harness import STEPS, TIMEOUT, Run, assert_same_weights, full_options, launch_environment, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_machines_lose_a_process_and_nothing_else(work, one, tmp_path):
    """Rank 3 dies after step 4, all restart from that step's checkpoint, and the log is that of one process."""
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    options = full_options(work, tmp_path / "out", 4, resume_from_checkpoint="last")
    command = [*torchrun(2, *meeting, "--max_restarts=3"), str(REPOSITORY / "train.py"), *flags(options)]
    # Otherwise the processes of a machine that restarts because the other one does would look for the first start's addresses.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
    environ = launch_environment(SHARD_FACTS=tmp_path / "out/_facts", DIE_AT="3:4", **own_store)
    machines = []
    for number in range(2):
        with (tmp_path / f"machine_{number}.log").open("w", encoding="utf-8") as log:
            machines.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
    try:
        codes = [machine.wait(timeout=2 * TIMEOUT) for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                for process in (*psutil.Process(machine.pid).children(recursive=True), machine):
                    process.kill()
                machine.wait()
    logs = [(tmp_path / f"machine_{number}.log").read_text(encoding="utf-8") for number in range(2)]
    assert codes == [0, 0], [log[-3000:] for log in logs]
    assert (tmp_path / "out/_facts/died").exists()
    assert any("exitcode: -9" in log or "SIGKILL" in log or "-9" in log for log in logs)

    run = Run(tmp_path / "out")
    assert len(run.facts()) == 4
    for name in ("loss", "eval_own_loss", "eval_shuffled_loss"):
        assert run.logged(name) == pytest.approx(one.logged(name), abs=1e-4), name
    file = f"checkpoint-{STEPS}/model.safetensors"
    assert_same_weights(run.weights(file), one.weights(file), atol=2e-4)
