"""What a user sees of each mistake in bad_inputs.yaml: the whole message, and the exit status."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3_server
import torch
import yaml
from commands import environment
from forks import forks
from s3_server import Server

from raytrain.cli import main
from raytrain.storage.checkpoint import Manifest

HERE = Path(__file__).parent
GOOD = """\
TASK: bad_tasks:{task}
OPTIMIZATION: {OPTIMIZER: adamw, BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}
SCALE: {NUM_WORKERS: 0, USE_GPU: false}
LOADER: {WORKERS: 0}
"""
RUN = "train --cfg_file run.yaml"


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row of the table; bad_inputs.yaml says what its fields mean."""

    id: str
    wrong: str
    status: int
    message: str = ""
    prints: str = ""
    run: str = RUN
    add: str = ""
    task: str = "Good"
    files: dict[str, str | bytes] = dataclasses.field(default_factory=dict)
    before: str = ""
    within_s: float = 30.0
    process: bool = False
    ray: bool = False

    @property
    def words(self) -> list[str]:
        return [*shlex.split(self.run), *shlex.split(self.add)]

    @property
    def takes_its_time(self) -> bool:
        """Whether something trains: before the command or in it, since what is no bad usage comes later."""
        return self.ray or self.process or bool(self.before) or self.status != 2


TABLE = [Bad(**row) for row in yaml.safe_load((HERE / "bad_inputs.yaml").read_text())]
rows = pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=bad.id, marks=[pytest.mark.ray] if bad.takes_its_time else []) for bad in TABLE]
)


def test_the_table_is_whole() -> None:
    assert len(TABLE) >= 45
    assert len({bad.id for bad in TABLE}) == len(TABLE)
    assert all(bad.message or bad.prints for bad in TABLE)


@rows
def test_a_bad_input_is_answered_with_what_is_wrong_and_what_to_do(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: Any
) -> None:
    if bad.ray and not bad.process:
        request.getfixturevalue("ray_address")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # it looks for dead loaders then
    for name, content in {"run.yaml": GOOD.replace("{task}", bad.task), **bad.files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with BEFORE[bad.before](tmp_path):
        capfd.readouterr()
        began = time.monotonic()
        status, out, err = as_process(bad.words) if bad.process else (in_process(bad.words), *capfd.readouterr())
        took_s = time.monotonic() - began
    told = err.replace(str(tmp_path), "{here}")
    assert re.fullmatch(pattern(bad.message), told), f"{bad.id}: expected\n{bad.message}\nbut found\n{told}"
    assert re.search(pattern(bad.prints), out), f"{bad.id}: {bad.prints!r} is not in\n{out}"
    assert status == bad.status
    assert took_s < bad.within_s


def pattern(text: str) -> str:
    """`...` stands for anything in a line, a line `(lines)` for any number of lines."""
    return "".join(
        r"(?:.*\n)*?" if line.strip() == "(lines)" else re.escape(line).replace(r"\.\.\.", ".*") + "\n"
        for line in text.splitlines()
    )


def in_process(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:  # argparse
        assert isinstance(ended.code, int)
        return ended.code


def as_process(words: list[str]) -> tuple[int, str, str]:
    output, errors = Path("printed.txt"), Path("printed-errors.txt")
    status = (
        forks().start(["raytrain", *words], Path.cwd(), environment(), output.absolute(), errors.absolute()).wait(120)
    )
    return status, output.read_text(), errors.read_text()


# What is done before the command, by the name in `before`


@contextmanager
def first_of_two(folder: Path) -> Iterator[None]:
    """This process is rank 0 of two that torchrun has started."""
    set_by_torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(set_by_torchrun)
    try:
        yield
    finally:
        for name in set_by_torchrun:
            del os.environ[name]


@contextmanager
def nothing(folder: Path) -> Iterator[None]:
    yield


@contextmanager
def trained(folder: Path) -> Iterator[None]:
    """The run has been trained to its end, in output/run/default."""
    assert main(shlex.split(RUN)) == 0
    yield


@contextmanager
def all_damaged(folder: Path) -> Iterator[None]:
    """It has, and then a bit of each of its checkpoints was flipped."""
    with trained(folder):
        for file in folder.glob("output/run/default/ckpt/*/checkpoint.pth"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        yield


@contextmanager
def all_lost(folder: Path) -> Iterator[None]:
    """It has, and then somebody removed its checkpoints."""
    with trained(folder):
        (folder / "output/run/default/ckpt").rename(folder / "elsewhere")
        yield


@contextmanager
def pickle_bomb(folder: Path) -> Iterator[None]:
    """bomb.pth runs a command when it is loaded as pickles are."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {folder}/exploded",)

    torch.save({"model_state": Bomb()}, folder / "bomb.pth")
    yield
    assert not (folder / "exploded").exists()


@contextmanager
def pickle_bomb_in_the_run(folder: Path) -> Iterator[None]:
    """It is the newest checkpoint of a run that was trained, and its manifest says what it should."""
    with trained(folder), pickle_bomb(folder):
        checkpoint = folder / "output/run/default/ckpt/checkpoint_epoch_2"
        data = (folder / "bomb.pth").read_bytes()
        facts = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = Manifest.from_json((checkpoint / "manifest.json").read_bytes())
        manifest = dataclasses.replace(manifest, files={"checkpoint.pth": facts})
        (checkpoint / "manifest.json").write_text(manifest.to_json())
        (checkpoint / "checkpoint.pth").write_bytes(data)
        yield


@contextmanager
def link_for_a_journal(folder: Path) -> Iterator[None]:
    """The run folder's journal is a link to a file of the user, which stays as it is."""
    (folder / "mine.txt").write_text("mine")
    (folder / "output/run/default").mkdir(parents=True)
    (folder / "output/run/default/journal.jsonl").symlink_to(folder / "mine.txt")
    yield
    assert (folder / "mine.txt").read_text() == "mine"


@contextmanager
def another_models_weights(folder: Path) -> Iterator[None]:
    torch.save({"model_state": {"weight": torch.zeros(5, 3), "head.weight": torch.zeros(2)}}, folder / "other.pth")
    yield


@contextmanager
def output_to(folder: Path, uri: Callable[[Server], str]) -> Iterator[None]:
    """OUTPUT is on a server of S3."""
    with s3_server.serving() as server, (folder / "run.yaml").open("a") as file:
        file.write(f"OUTPUT: {uri(server)}\n")
        file.close()
        yield


def with_another_key(server: Server) -> str:
    """Only one user is let in, who has another key."""
    uri = server.uri("bucket/runs")
    server.let_in_one_user()
    return uri


def with_another_secret(server: Server) -> str:
    server.let_in_one_user()
    server.secret = "a secret"
    return server.uri("bucket/runs")


def of_no_bucket(server: Server) -> str:
    return server.uri("bukket/runs")


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """No file can grow past 12 kB: to a program that is a full disk under another name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_288, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BEFORE = {
    "": nothing,
    "trained": trained,
    "all damaged": all_damaged,
    "all lost": all_lost,
    "pickle bomb": pickle_bomb,
    "pickle bomb in the run": pickle_bomb_in_the_run,
    "link for a journal": link_for_a_journal,
    "another model's weights": another_models_weights,
    "full disk": full_disk,
    "others' bucket": partial(output_to, uri=with_another_key),
    "another secret": partial(output_to, uri=with_another_secret),
    "no bucket": partial(output_to, uri=of_no_bucket),
    "torchrun": first_of_two,
}
