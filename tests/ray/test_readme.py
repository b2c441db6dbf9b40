"""Every command and every example of the README, run as a user would."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import commanded

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
RAYTRAIN = [line for line in COMMANDS if line.startswith("raytrain ") and "--address" not in line]
TUTORIAL = "raytrain train --cfg_file configs/digits.yaml"  # in full
FEW_SCENES = ["DATA_CONFIG.SIMULATION.NUM_SCENES", "train:24,val:8"]
pytestmark = pytest.mark.ray


def block(kind: str, containing: str) -> str:
    return next(text for found, text in BLOCKS if found == kind and containing in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the README has told its reader to write by then; the commands run in here, in order."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "mytask.py").write_text(block("python", "class LineTask"))
    (folder / "line.yaml").write_text(block("yaml", "mytask:LineTask"))
    (folder / "from_python.py").write_text(block("python", "load_config"))
    return folder


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{shlex.join(words)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_knows_no_other_commands_than_those_run_here():
    others = {line.split()[0] for line in COMMANDS} - {"make", "raytrain", "ray", "torchrun"}
    assert not others
    assert [line for line in COMMANDS if line.startswith("make")] == ["make train", "make test"]


def test_make_train_trains_a_detector_on_two_workers(folder):
    """First, so that the same command in test_commands finds its run complete."""
    shutil.copy(ROOT / "Makefile", folder)
    few = f"ARGS=--set {' '.join(FEW_SCENES)}"
    out = run(["make", "--old-file=setup", "train", f"BIN={Path(sys.executable).parent}", few], folder)
    assert re.search(r"^  Car_3d/moderate_R40 +[\d.]+$", out, flags=re.M)
    assert re.search(r"run folder +\S+/output/pointpillars_sim/default\n +curves +tensorboard --logdir", out)
    assert len(list(folder.glob("output/pointpillars_sim/default/eval/epoch_*/val/pictures/*.png"))) == 4


@pytest.mark.parametrize("command", RAYTRAIN)
def test_commands(command, folder):
    words = shlex.split(command)[1:]
    if words[0] == "tune":  # a few of its trials
        words += ["--num_samples", "3", "--epochs", "3"]
    if "pointpillars_sim" in command and words[0] != "simulate":  # a few of its scenes
        words += [] if "--set" in words else ["--set"]
        words += FEW_SCENES
    out = commanded(words, folder).ended(0)
    assert "finished after epoch" in out or "complete" in out or words[0] != "train"
    if command == TUTORIAL:
        accuracy = re.search(r"^  accuracy +([\d.]+)$", out, flags=re.M)
        assert accuracy is not None and float(accuracy[1]) >= 0.98


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("torchrun ")])
def test_the_command_for_torchrun(command, folder):
    out = run([sys.executable, "-m", "torch.distributed.run", "--standalone", *shlex.split(command)[1:]], folder)
    assert "finished after epoch 2" in out


def test_the_python_example(folder):
    assert "finished" in run([sys.executable, "from_python.py"], folder)


def test_the_tutorial_is_a_command_of_the_readme():
    assert TUTORIAL in RAYTRAIN


def test_a_task_is_about_fifteen_lines():
    lines = [line for line in block("python", "class LineTask").splitlines() if line.strip()]
    assert len(lines) <= 15


@contextlib.contextmanager
def started_by_hand(command: str, port: int, folder: Path) -> Iterator[None]:
    """The cluster of a `ray start` command, which stays in the foreground and ends with its process group."""
    words = [str(Path(sys.executable).with_name("ray")), *shlex.split(command)[1:]]
    words[words.index("--port") + 1] = str(port)
    words += ["--block", "--num-cpus", "4", "--include-dashboard", "false", "--disable-usage-stats"]
    words += ["--temp-dir", str(folder)]
    with open(folder / "ray-start.log", "wb") as log:
        head = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while "ray runtime started" not in (folder / "ray-start.log").read_text().lower():
            assert head.poll() is None and time.monotonic() < deadline, (folder / "ray-start.log").read_text()
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def test_a_cluster_started_by_hand_is_joined(folder):
    start, train = (line for line in COMMANDS if line.startswith("ray ") or "--address" in line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temp = Path(f"/tmp/raytrain-readme-{os.getpid()}")  # short: sockets lie below it
    temp.mkdir()
    try:
        with started_by_hand(start, port, temp):
            words = shlex.split(train.replace("6379", str(port)))[1:]
            assert "finished after epoch 2" in commanded(words, folder).ended(0)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
