"""A run folder behind s3:// keeps the promises of one on a disk. The server is a real one, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server
import torch
from runs import EPOCHS, Run, assert_curves_are_whole, assert_same_bits
from s3_server import Server

from raytrain.cli import main
from raytrain.storage.storage import open_storage

pytestmark = pytest.mark.ray


@pytest.fixture
def server() -> Iterator[Server]:
    with s3_server.serving() as server:
        yield server


def folder_of(uri: str) -> Any:
    """The run folder below OUTPUT."""
    address, _, options = uri.partition("?")
    return open_storage(f"{address}/run/default?{options}")


def payload(uri: str, scratch: Path) -> dict[str, Any]:
    folder_of(uri).download(f"ckpt/checkpoint_epoch_{EPOCHS}/checkpoint.pth", scratch / "last.pth")
    return torch.load(scratch / "last.pth", weights_only=True)


def test_a_killed_run_goes_on_with_the_environments_credentials_to_the_same_bits(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed_here: Run
) -> None:
    server.let_in_one_user()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    run, uri = Run(tmp_path), server.bare_uri("bucket/output")
    flags = ["--num_workers", "0", "--output", uri]
    run.killed_at(14, *flags)
    run.run(*flags)
    assert_same_bits(payload(uri, tmp_path), undisturbed_here.payload())
    left = sorted(name.rpartition("/ckpt/")[2] for name in server.objects if "/ckpt/" in name)
    kept = {name.partition("/")[0] for name in left}
    assert left == sorted(f"{name}/{file}" for name in kept for file in ("checkpoint.pth", "manifest.json"))
    assert 3 <= len(kept) <= 4 and f"checkpoint_epoch_{EPOCHS}" in kept  # KEEP_LAST, and the best one


def test_a_damaged_object_is_named_and_passed_over_and_no_secret_is_written_down(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], undisturbed_here: Run
) -> None:
    run, uri = Run(tmp_path), server.uri("bucket/output")
    flags = ["--num_workers", "0", "--output", uri]
    (run.gate / "fail").write_text("14")
    assert main(run.words(*flags)) == 1
    (run.gate / "fail").unlink()
    newest, storage = "ckpt/checkpoint_step_12/checkpoint.pth", folder_of(uri)
    data = bytearray(storage.read_bytes(newest))
    data[len(data) // 2] ^= 1
    storage.write_bytes(newest, bytes(data))
    assert main(run.words(*flags)) == 0
    said = "".join(capfd.readouterr())
    assert "passed over checkpoint_step_12: s3://key:***@bucket/output/run/default/ckpt/checkpoint_step_12" in said
    assert_same_bits(payload(uri, tmp_path), undisturbed_here.payload())
    assert ":secret@" not in said
    for name in server.objects:
        with server.filesystem().open_input_file(name) as file:
            assert b":secret@" not in file.read(), name


def test_a_run_ends_with_the_same_bits_on_a_network_that_fails_again_and_again(
    server: Server, tmp_path: Path, undisturbed_here: Run
) -> None:
    """In one stretch so many requests go wrong that pyarrow by itself gives up."""
    run = Run(tmp_path)
    singly = {20: "lost", 45: "reset", 70: "hang", 95: "lost", 140: "reset", 160: "lost"}
    faults = {**singly, **dict.fromkeys(range(110, 116), "slow down")}
    with server.spoilt(faults.get) as proxy:
        uri = server.uri("bucket/output", proxy.port)
        assert main(run.words("--num_workers", "0", "--output", uri)) == 0
        assert len(proxy.spoilt) == len(faults)
    uri = server.uri("bucket/output")
    assert_same_bits(payload(uri, tmp_path), undisturbed_here.payload())
    storage = folder_of(uri)
    for name in ("journal.jsonl", *(f"tensorboard/{name}" for name in tensorboard_files(storage))):
        (run.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(name, run.run_dir / name)
    assert_curves_are_whole(run, steps_per_epoch=11)


def tensorboard_files(storage: Any) -> list[str]:
    curves, evals = storage.list("tensorboard"), storage.list("tensorboard/eval")
    return [name for name in curves if name != "eval"] + [f"eval/{name}" for name in evals]
