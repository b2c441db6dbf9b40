"""What may befall a run, in every phase of it: the same command goes on to the same bits, or says why it does not."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import DEADLINE_S, Launched, alive, torchrun, wait_for
from runs import EPOCHS, Run, assert_same_bits, assert_uses_once, keeper_of, keepers_of

import raytrain
from raytrain.cli import main
from raytrain.keeper import client

pytestmark = pytest.mark.ray

WORKERS = 2  # virtual ones
FAULTY = {
    "TASK": "tasks_for_faults:Faulty",
    "SCALE.VIRTUAL_WORKERS": WORKERS,
    "CHECKPOINT.SNAPSHOT_EVERY": 1,
    "CHECKPOINT.EVERY_STEPS": 2,
}
PHASES = {"data": 2, "forward": 3, "saving": 4, "eval": 5, "backward": 9, "reduce": 13}  # each with a step of it
HERE = ("--num_workers", "0")
FORKS = multiprocessing.get_context("forkserver")  # that has torch already: a launch takes a second less
FORKS.set_forkserver_preload(["raytrain.cli", "raytrain.launch"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), FAULTY)
    cfg = raytrain.load_config(run.config_file, ["OUTPUT", str(run.folder / "output")])
    assert raytrain.train(cfg, num_workers=0, quiet=True).status == "finished"
    return run


@pytest.fixture
def run(tmp_path: Path, undisturbed: Run) -> Iterator[Run]:
    """One that the test disturbs. The same command then ends it with the same bits, and leaves nothing."""
    run = Run(tmp_path, FAULTY)
    yield run
    for name in ("hold", "slow", "fault"):
        (run.gate / name).unlink(missing_ok=True)
    assert main(run.words(*HERE)) == 0
    assert_same_bits(run.payload(), undisturbed.payload())
    assert_uses_once(run, WORKERS)
    assert_tidy(run)


def assert_tidy(run: Run) -> None:
    """Nothing but checkpoints in ckpt/, and no keeper."""
    assert [name for name in names_in(run.ckpt) if not name.startswith("checkpoint_")] == []
    assert client.connect(str(run.run_dir)) is None


class Forked:
    """The command in a process of its own."""

    def __init__(self, run: Run) -> None:
        self._output = run.folder / "output.txt"
        self._process = FORKS.Process(target=command, args=(run.words(*HERE), self._output))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def ended(self, status: int) -> str:
        """What it printed, once it has ended with this exit status."""
        self._process.join(DEADLINE_S)
        said = self._output.read_text()
        assert self._process.exitcode == status, f"exit status {self._process.exitcode}, not {status}:\n{said}"
        return said

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()


def command(words: list[str], output: Path) -> None:
    if os.getpgrp() != os.getpid():  # else it leads one already, after a run in the process of the tests
        os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(main(words))


def delete(run: Run, checkpoints: list[str]) -> None:
    """ckpt/ as a whole, once it holds just these."""
    wait_for(lambda: sorted(names_in(run.ckpt)) == checkpoints, "the checkpoints")
    shutil.rmtree(run.ckpt)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def wish(run: Run, phase: str, word: str, rank: int = 0) -> None:
    (run.gate / "fault").write_text(f"{phase} {PHASES[phase]} {rank} {word}")


def halted_in(run: Run, phase: str) -> Forked:
    """The command, halted (SIGSTOP) in the middle of that phase."""
    wish(run, phase, "SIGSTOP")
    launched = Forked(run)
    wait_for(lambda: state_of(launched.pid) == "T", f"the phase {phase}")
    return launched


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def halted_at(run: Run, step: int) -> Forked:
    """The command, while the pass of that step waits at the gate."""
    run.hold(step)
    launched = Forked(run)
    held = run.gate / f"held-{launched.pid}"
    wait_for(held.exists, "the step at which the test holds the run")
    return launched


@pytest.mark.parametrize("and_its_keeper", [False, True], ids=["alone", "with its keeper"])
def test_a_process_killed_in_one_phase_after_another_ends_with_the_same_bits(run: Run, and_its_keeper: bool) -> None:
    for phase in PHASES:
        if phase != "reduce":  # one process has nothing to reduce
            launched = halted_in(run, phase)
            if and_its_keeper:
                os.kill(keeper_of(run), signal.SIGKILL)
            launched.kill()


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "reduce"])
def test_a_sigterm_in_any_phase_leaves_a_state_to_go_on_from(run: Run, phase: str) -> None:
    wish(run, phase, "SIGTERM")
    assert main(run.words(*HERE)) == 75
    assert run.lines("end")[-1]["status"] == "stopped"


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "eval"])
def test_an_error_in_any_phase_leaves_the_state_before_it(run: Run, phase: str) -> None:
    wish(run, phase, "raise")
    assert main(run.words(*HERE)) == 1
    assert run.payload(run.names()[-1])["it"] == PHASES[phase] + (phase == "eval")
    assert run.lines("event")[-1]["event"] == "failure"


@pytest.mark.parametrize("and_its_keeper", [False, True], ids=["alone", "with its keeper"])
@pytest.mark.parametrize("leftover", [".writing-checkpoint", ".trash-checkpoint"], ids=["uploading", "retention"])
def test_a_process_killed_while_its_keeper_writes_ends_with_the_same_bits(
    run: Run, leftover: str, and_its_keeper: bool
) -> None:
    """The keeper is halted in its work; then it dies too, or goes on with it."""
    (run.gate / "slow").write_text("0.02")
    for _ in range(2):
        launched = Forked(run)
        while not any(name.startswith(leftover) for name in names_in(run.ckpt)):
            assert alive(launched.pid)
        keeper = wait_for(lambda: keepers_of(run), "the keeper")[0]
        os.kill(keeper, signal.SIGSTOP)
        launched.kill()
        os.kill(keeper, signal.SIGKILL if and_its_keeper else signal.SIGCONT)


def test_a_disk_that_is_full_ends_the_run_and_what_memory_holds_is_saved_once_there_is_room(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = halted_at(run, 3)
    keeper = keeper_of(run)
    wait_for(lambda: names_in(run.ckpt) == ["checkpoint_step_2"], "the first checkpoint")
    _, hard = resource.prlimit(keeper, resource.RLIMIT_FSIZE)
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (1 << 20, hard))
    run.release(slow_s=0.05)
    said = launched.ended(1)
    assert "could not be saved" in said and "File too large" in said
    assert run.names()[-1] == "checkpoint_step_2"
    assert main(run.words(*HERE)) == 2
    told = capsys.readouterr().err
    assert f"the state after step 4 stands in the memory of process {keeper} only" in told and "too large" in told
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (hard, hard))
    assert main(run.words(*HERE)) == 0
    assert run.lines("run")[-1]["step"] == 4


def test_a_folder_of_checkpoints_that_is_deleted_comes_back_with_the_next_save(run: Run) -> None:
    launched = halted_at(run, 3)
    delete(run, ["checkpoint_step_2"])
    (run.gate / "hold").write_text("9")
    held = run.gate / f"held-{launched.pid}"
    held.unlink()
    wait_for(held.exists, "step 9")
    launched.kill()


def test_a_folder_of_checkpoints_that_is_deleted_during_an_evaluation_comes_back_with_its_metrics(run: Run) -> None:
    launched = halted_in(run, "eval")
    saved = wait_for(lambda: list(run.ckpt.glob("checkpoint_epoch_*/manifest.json")), "the epoch's checkpoint")[-1]
    shutil.rmtree(run.ckpt)
    os.kill(launched.pid, signal.SIGCONT)
    launched.ended(0)
    assert saved.parent.name in {record["name"] for record in run.records("checkpoint")}


def test_what_an_old_run_left_unfinished_is_none_of_a_new_ones(run: Run) -> None:
    assert main(run.words(*HERE)) == 0
    (run.ckpt / f"checkpoint_epoch_{EPOCHS}").rename(run.ckpt / f".writing-checkpoint_epoch_{EPOCHS}-1.2-deadbeef")
    assert main(run.words(*HERE, "--resume", "never", "--overwrite")) == 0
    assert list(run.ckpt.glob(f"superseded/*/checkpoint_epoch_{EPOCHS}"))
    shutil.rmtree(run.ckpt / "superseded")


def test_a_process_killed_right_after_its_checkpoints_were_deleted_has_lost_nothing(run: Run) -> None:
    launched = halted_at(run, 5)
    delete(run, ["checkpoint_step_2", "checkpoint_step_4"])
    launched.kill()


@pytest.mark.parametrize("and_its_keeper", [False, True], ids=["alone", "with its keeper"])
def test_one_of_two_processes_killed_in_reduce_ends_the_run_and_the_same_command_goes_on(
    run: Run, and_its_keeper: bool
) -> None:
    wish(run, "reduce", "SIGKILL", rank=1)
    launched = on_two(run)
    if and_its_keeper:
        keeper = wait_for(lambda: keepers_of(run), "the keeper")[0]
        wait_for(lambda: not (run.gate / "fault").exists(), "the fault")
        os.kill(keeper, signal.SIGKILL)
    assert "SIGKILL" in launched.ended(1)
    assert not (run.gate / "fault").exists()


def test_a_run_that_torchrun_starts_again_does_not_go_back_to_the_checkpoint_it_was_begun_at(run: Run) -> None:
    halted_at(run, 9).kill()
    wait_for(lambda: not keepers_of(run), "the end of the keeper")
    run.release()
    (run.gate / "fault").write_text("reduce 9 1 SIGKILL")
    launched = on_two(run, "--max-restarts", "1", begun_at="checkpoint_epoch_1")
    launched.ended(0)
    *_, begun, gone_on = [record["step"] for record in run.lines("run")]
    assert begun == 6 and gone_on >= 9
    shutil.rmtree(run.ckpt / "superseded")


def on_two(run: Run, *options: str, begun_at: str | None = None) -> Launched:
    """The command in two processes of torchrun, begun at that checkpoint of the run."""
    words = run.words(*(["--resume", str(run.ckpt / begun_at)] if begun_at else []))
    return torchrun(["-m", "raytrain", *words], run.folder, *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
