"""Every command of README.md and docs/, run as a reader would, in the order of the pages and in one folder."""

from __future__ import annotations

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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
from commands import commanded, environment
from pages import ROOT, Command, commands, write_examples

COMMANDS = commands()
TUTORIAL = "raytrain train --cfg_file configs/digits.yaml"
FEW_EPOCHS = ["--epochs", "20"]  # of the tutorial's 50
FEW_SCENES = ["DATA_CONFIG.SIMULATION.NUM_SCENES", "train:24,val:8"]
S3 = "127.0.0.1:9000"  # where the pages say that it is
FIRST = ("make train", "make test")  # the first has a test of its own, the second is what runs here
OF_THE_CLUSTER = [each for each in COMMANDS if each.words[0] == "ray" or "--address" in each.words]
ONE_BY_ONE = [each for each in COMMANDS if each not in OF_THE_CLUSTER and str(each) not in FIRST]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_examples(folder)
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server.serving() as server:
        yield f"{server.host}:{server.port}"


def run(words: list[str], folder: Path, status: int = 0) -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == status, f"{shlex.join(words)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def abridged(words: list[str]) -> list[str]:
    """With a few of its trials, of its scenes, or of the tutorial's epochs."""
    if ["raytrain", *words] == TUTORIAL.split():
        return [*words, *FEW_EPOCHS]
    if words[0] == "tune":
        return [*words, "--num_samples", "3", "--epochs", "3"]
    if words[0] != "simulate" and "configs/pointpillars_sim.yaml" in words:
        return [*words, *([] if "--set" in words else ["--set"]), *FEW_SCENES]
    return words


def test_the_pages_know_no_other_commands_than_those_run_here():
    assert {each.words[0] for each in COMMANDS} == {"make", "raytrain", "python", "ray", "torchrun"}
    assert [str(each) for each in COMMANDS if each.words[0] == "make"] == list(FIRST)
    assert TUTORIAL in map(str, ONE_BY_ONE)


def test_make_train_trains_a_detector_on_two_workers(folder):
    """First, so that the same command in test_commands finds its run complete."""
    shutil.copy(ROOT / "Makefile", folder)
    few = f"ARGS=--set {' '.join(FEW_SCENES)}"
    out = run(["make", "--old-file=setup", "train", f"BIN={Path(sys.executable).parent}", few], folder)
    assert re.search(r"^  Car_3d/moderate_R40 +[\d.]+$", out, flags=re.M)
    assert re.search(r"run folder +\S+/output/pointpillars_sim/default\n +curves +tensorboard --logdir", out)
    pictures = folder.glob("output/pointpillars_sim/default/eval/epoch_*/val/pictures/*.png")
    assert Counter(path.parts[-4] for path in pictures) == {"epoch_1": 4, "epoch_8": 4}


@pytest.mark.parametrize("command", ONE_BY_ONE, ids=str)
def test_commands(command: Command, folder: Path, request: pytest.FixtureRequest):
    program, *words = command.words
    if any(S3 in word for word in words):
        words = [word.replace(S3, request.getfixturevalue("s3")) for word in words]
    if program == "python":
        assert run([sys.executable, *words], folder, command.status)
    elif program == "torchrun":
        out = run([sys.executable, "-m", "torch.distributed.run", "--standalone", *words], folder, command.status)
        assert "finished after epoch" in out
    else:
        out = commanded(abridged(words), folder, dict(command.env)).ended(command.status)
        assert command.status or words[0] != "train" or "finished after epoch" in out or "complete" in out
        if str(command) == TUTORIAL:
            accuracy = re.search(r"^  accuracy +([\d.]+)$", out, flags=re.M)
            assert accuracy is not None and float(accuracy[1]) >= 0.98


@contextlib.contextmanager
def started_by_hand(start: Command, port: int, folder: Path) -> Iterator[None]:
    """The cluster of a `ray start` command, which stays in the foreground and ends with its process group."""
    words = [str(Path(sys.executable).with_name("ray")), *start.words[1:]]
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
    start, *trains = OF_THE_CLUSTER
    assert ["1-4" in train.words for train in trains] == [False, True]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temp = Path(f"/tmp/raytrain-docs-{os.getpid()}")  # short: sockets lie below it
    temp.mkdir()
    try:
        with started_by_hand(start, port, temp):
            for train in trains:
                words = [word.replace("6379", str(port)) for word in train.words[1:]]
                assert "finished after epoch 2" in commanded(words, folder).ended(0)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
