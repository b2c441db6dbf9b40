"""The process that keeps a run's state: what it lets workers do that are started again."""

from __future__ import annotations

import os
from pathlib import Path

from raytrain.board import Slots, host, started_at
from raytrain.memory import Kept
from raytrain.progress import Progress
from raytrain.storage import open_storage
from raytrain.store import CheckpointPolicy, newest_verified

SIZE_BYTES = 64 << 20  # takes a while to write


def test_a_worker_that_is_started_again_fills_no_slot_that_is_still_written_for_the_one_before(tmp_path: Path) -> None:
    policy = dict.fromkeys(CheckpointPolicy.__annotations__) | {"KEEP_LAST": 3, "KEEP_BEST": 1}
    manifest = {"config": {}, "world": {}, "seed": 0, "metrics": None}
    dead, slots = Kept(str(tmp_path), "launch"), Slots.made(SIZE_BYTES)
    dead.line.say(op="slots", slot_bytes=slots.slot_bytes)
    dead.line.give(slots.descriptor)
    driver = [host(), os.getpid(), started_at(os.getpid())]
    dead.line.say(op="about", manifest=manifest, policy=policy, driver=driver)
    dead.board.commit(0, Progress(0, 8, 1), SIZE_BYTES)
    dead.line.say(op="save", number=1, slot=0, manifest=manifest, may_be_replaced=False)
    dead.close()
    again = Kept(str(tmp_path), "launch")
    assert again.slots is not None
    again.slots.view(0, SIZE_BYTES)[:] = b"\1" * SIZE_BYTES
    again.end()
    found, passed_over = newest_verified(open_storage(str(tmp_path)))
    assert found is not None and found.name == "checkpoint_step_1" and not passed_over
    with (tmp_path / "ckpt" / found.name / "checkpoint.pth").open("rb") as file:
        assert not any(file.read())
