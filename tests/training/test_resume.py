"""Where a run goes on, and what it refuses to go on under."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import raytrain
from raytrain.config.load import with_overrides
from raytrain.config.sections import Config
from raytrain.errors import CheckpointError, ResumeError, TrainingError
from raytrain.journal.records import read_journal
from raytrain.launch import Result
from raytrain.progress import Plan, Progress
from raytrain.storage.checkpoint import Manifest, read_manifest, write_checkpoint
from raytrain.storage.local import LocalStorage
from raytrain.storage.state_file import dumps, load_weights_file
from raytrain.storage.storage import open_storage
from raytrain.storage.store import Store
from raytrain.training.resume import (
    FIXED,
    FREE,
    Origin,
    check_plan,
    choose,
    compare,
    is_complete,
    newest_to_trust,
    origin_at,
    other_bits,
)

TREE = {
    "TASK": "tasks_for_units:PredictingTask",
    "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 2},
    "SCALE": {"NUM_WORKERS": 0, "VIRTUAL_WORKERS": 1, "USE_GPU": False},
    "LOADER": {"WORKERS": 0},
    "LOG": {"EVERY": 1},
}
CFG = Config.model_validate(TREE)
PLAN = Plan(num_samples=48, batch_size=4, virtual_workers=1, accumulate=1, num_epochs=2)
WORLD = {"num_workers": 1, "virtual_workers": 1, "num_samples": 48, "batch_size": 4, "accumulate": 1}


def changed(*words: str) -> dict[str, Any]:
    return with_overrides(CFG, words).to_tree()


# What may change


OTHER_VALUES = {
    "TASK": "other.tasks:Task",
    "SEED": "1",
    "LOADER.LAST": "drop",
    "LOADER.SHUFFLE": "false",
    "OPTIMIZATION.BATCH_SIZE_PER_GPU": "8",
    "OPTIMIZATION.ACCUMULATE": "2",
    "OPTIMIZATION.OPTIMIZER": "sgd",
    "SCALE.VIRTUAL_WORKERS": "2",
}


def test_every_fixed_key_is_tried_here() -> None:
    assert OTHER_VALUES.keys() == FIXED.keys()


@pytest.mark.parametrize("key", FIXED)
def test_what_would_corrupt_the_run_is_refused_with_old_new_reason_and_what_to_do(key: str) -> None:
    new = changed(key, OTHER_VALUES[key])
    with pytest.raises(ResumeError) as raised:
        compare(manifest(Progress(1, 0, 12)), new, False, "output/ckpt/checkpoint_epoch_1")
    first, line, advice = str(raised.value).split("\n")
    assert first == "output/ckpt/checkpoint_epoch_1 was made with another config:"
    assert line.startswith(f"  {key}: was ") and f"now {OTHER_VALUES[key]}".lower() in line.lower()
    assert FIXED[key] in line
    assert "--extra_tag" in advice and "--allow-config-change" in advice


@pytest.mark.parametrize("key", FIXED)
def test_with_leave_it_is_told_instead(key: str) -> None:
    notes = compare(manifest(Progress(1, 0, 12)), changed(key, OTHER_VALUES[key]), True, "x")
    assert len(notes) == 1 and notes[0].startswith(f"config differs from the checkpoint's: {key}: was ")


def test_every_other_difference_is_told_key_by_key() -> None:
    new = changed(
        "OPTIMIZATION.LR", "0.1", "OPTIMIZATION.NUM_EPOCHS", "9", "MODEL.WIDTH", "3", "CHECKPOINT.KEEP_LAST", "2"
    )
    assert compare(manifest(Progress(1, 0, 12)), new, False, "x") == [
        "config differs from the checkpoint's: MODEL.WIDTH: was absent, now 3",
        "config differs from the checkpoint's: OPTIMIZATION.NUM_EPOCHS: was 2, now 9",
        "config differs from the checkpoint's: OPTIMIZATION.LR: was 0.003, now 0.1",
        "config differs from the checkpoint's: CHECKPOINT.KEEP_LAST: was 5, now 2",
    ]


def test_a_key_that_there_was_none_of_is_told_unless_it_has_its_default() -> None:
    before = CFG.to_tree()
    del before["LOADER"]["SHUFFLE"], before["EVAL"], before["OPTIMIZATION"]["SPIKE"]
    old = manifest(Progress(1, 0, 12), config=before)
    assert compare(old, CFG.to_tree(), False, "x") == []
    assert compare(old, changed("LOADER.SHUFFLE", "false", "EVAL.EVERY", "2", "MODEL.WIDTH", "3"), False, "x") == [
        "config differs from the checkpoint's: MODEL.WIDTH: was absent, now 3",
        "config differs from the checkpoint's: LOADER.SHUFFLE: was absent, now False",
        "config differs from the checkpoint's: EVAL: was absent, now {'EVERY': 2, 'LAST_EPOCHS': 0, 'PICTURES': 4}",
    ]


def test_phases_that_had_begun_are_told_and_later_ones_are_nobodys_business() -> None:
    phases = ["OPTIMIZATION.PHASES", "[{FROM_EPOCH: 1, LR: 0.5}, {FROM_EPOCH: 2, LR: 0.1}]"]
    begun = "OPTIMIZATION.PHASES: was [], now [{'FROM_EPOCH': 1, 'LR': 0.5}]"
    assert compare(manifest(Progress(1, 0, 12)), changed(*phases), False, "x") == []
    for progress in (Progress(1, 4, 13), Progress(2, 0, 24)):
        assert compare(manifest(progress), changed(*phases), False, "x") == [
            f"config differs from the checkpoint's: {begun}"
        ]
    assert compare(manifest(Progress(1, 4, 13), config=changed(*phases)), CFG.to_tree(), False, "x") == [
        "config differs from the checkpoint's: OPTIMIZATION.PHASES: was [{'FROM_EPOCH': 1, 'LR': 0.5}], now []"
    ]


def test_where_and_how_fast_a_run_runs_is_nobodys_business() -> None:
    words = ["OUTPUT", "elsewhere", "TAG", "b", "EXTRA_TAG", "c", "SCALE.NUM_WORKERS", "1", "LOG.EVERY", "7"]
    assert compare(manifest(Progress(1, 0, 12)), changed(*words), False, "x") == []
    assert not any(key.startswith(FREE) for key in FIXED)


def manifest(progress: Progress, **changes: Any) -> Manifest:
    return dataclasses.replace(Manifest(progress, CFG.to_tree(), WORLD, 0), **changes)


@pytest.mark.parametrize(
    "change",
    [
        ("num_samples", 48, 50),
        ("batch_size", 4, 2),
        ("virtual_workers", 1, 3),
        ("accumulate", 1, 2),
    ],
)
def test_data_that_is_cut_otherwise_is_refused(change: tuple[str, int, int]) -> None:
    name, old, new = change
    plan = dataclasses.replace(PLAN, **{name: new})
    with pytest.raises(
        ResumeError, match=rf"there was made with other data or another batch:\n  {name}: was {old}, now"
    ):
        check_plan(manifest(Progress(1, 0, 12)), plan, False, "there")
    assert check_plan(manifest(Progress(1, 0, 12)), plan, True, "there") is False
    assert check_plan(manifest(Progress(1, 0, 12)), PLAN, False, "there") is True


# Which checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Result]:
    """A finished run of two epochs with a checkpoint after each."""
    cfg = with_overrides(CFG, ["OUTPUT", str(tmp_path_factory.mktemp("trained"))])
    return cfg, raytrain.train(cfg, quiet=True)


@pytest.fixture
def run_dir(trained: tuple[Config, Result], tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    shutil.copytree(trained[1].run_dir, tmp_path / "output" / "run" / "default")
    return tmp_path / "output" / "run" / "default"


def store_of(run_dir: Path, launch: str = "another") -> Store:
    return Store(LocalStorage(run_dir), CFG.CHECKPOINT, launch)


def test_auto_takes_the_newest_and_names_what_it_passes_over(run_dir: Path) -> None:
    origin = choose(store_of(run_dir), "auto")
    assert origin is not None and (origin.name, origin.notes) == ("checkpoint_epoch_2", [])
    (run_dir / "ckpt" / "checkpoint_epoch_2" / "checkpoint.pth").write_bytes(b"torn")
    origin = choose(store_of(run_dir), "auto")
    assert origin is not None and origin.name == "checkpoint_epoch_1"
    assert len(origin.notes) == 1 and origin.notes[0].startswith("passed over checkpoint_epoch_2: ")
    assert "has 4 bytes" in origin.notes[0]


def test_training_never_starts_over_silently(run_dir: Path) -> None:
    for name in ("checkpoint_epoch_1", "checkpoint_epoch_2"):
        (run_dir / "ckpt" / name / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"never starts over silently:\n.*epoch_2.*\n.*epoch_1.*\n.*--overwrite"):
        choose(store_of(run_dir), "auto")


def test_an_empty_folder_starts_at_step_0(tmp_path: Path) -> None:
    assert choose(store_of(tmp_path), "auto") is None
    assert choose(store_of(tmp_path), "fresh") is None


@pytest.mark.parametrize("start", ["fresh", "a path"])
def test_workers_that_are_started_again_go_on_from_their_own_launch(start: str, run_dir: Path) -> None:
    own = Manifest.from_json((run_dir / "ckpt" / "checkpoint_epoch_2" / "manifest.json").read_text()).launch
    origin = choose(store_of(run_dir, launch=own), start)
    assert origin is not None and origin.name == "checkpoint_epoch_2"


def test_a_path_may_be_a_run_a_checkpoint_or_its_file(run_dir: Path) -> None:
    checkpoint = run_dir / "ckpt" / "checkpoint_epoch_1"
    for path in (checkpoint, checkpoint / "checkpoint.pth"):
        origin = origin_at(str(path))
        assert (origin.path, origin.name) == (str(checkpoint), None)
        assert origin.manifest is not None and origin.manifest.progress.epoch == 1
    newest = origin_at(str(run_dir))
    assert newest.path.endswith("checkpoint_epoch_2")
    bare = str(shutil.copy(checkpoint / "checkpoint.pth", run_dir / "weights.pth"))
    assert origin_at(bare) == Origin(bare, None, None, [])


def test_a_path_without_checkpoint_is_an_error_that_says_what_can_be_given(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(ResumeError, match=r"(no checkpoint|no such file).*\.pth file, a checkpoint folder"):
            origin_at(str(path))
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint to trust"):
        origin_at(str(tmp_path))


def test_a_run_is_complete_when_its_last_epoch_is_evaluated() -> None:
    def origin(progress: Progress, metrics: Any) -> Origin:
        return Origin("x", "x", manifest(progress, metrics=metrics), [])

    assert is_complete(origin(Progress(2, 0, 24), {"a": 1.0}), 2)
    assert is_complete(origin(Progress(2, 0, 24), {}), 2)
    assert not is_complete(origin(Progress(2, 0, 24), None), 2)
    assert not is_complete(origin(Progress(1, 44, 23), {"a": 1.0}), 2)
    assert not is_complete(None, 2) and not is_complete(Origin("x.pth", None, None, []), 2)


# Going on


def train(run_dir: Path, *words: str, **options: Any) -> Result:
    output = str(run_dir.parent.parent)
    return raytrain.train(with_overrides(CFG, ["OUTPUT", output, *words]), quiet=True, **options)


@pytest.mark.ray
def test_more_epochs_go_on_where_the_run_ended(run_dir: Path) -> None:
    result = train(run_dir, "OPTIMIZATION.NUM_EPOCHS", "3")
    assert result.status == "finished"
    records = read_journal(run_dir / "journal.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 37))
    notes = [r["message"] for r in records if r["kind"] == "event"]
    assert "config differs from the checkpoint's: OPTIMIZATION.NUM_EPOCHS: was 2, now 3" in notes


@pytest.mark.ray
def test_another_batch_size_is_refused_and_with_leave_keeps_the_place_in_the_data(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "ckpt" / "checkpoint_epoch_2")
    (run_dir / "journal.jsonl").unlink()
    words = ["OPTIMIZATION.BATCH_SIZE_PER_GPU", "8"]
    with pytest.raises(ResumeError, match="BATCH_SIZE_PER_GPU: was 4, now 8"):
        train(run_dir, *words)
    result = train(run_dir, *words, allow_config_change=True)
    assert result.status == "finished"
    records = read_journal(run_dir / "journal.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(7, 13))  # 6 steps an epoch now
    notes = [r["message"] for r in records if r["kind"] == "event"]
    assert "another batch or data set: step 12 counts as step 6 of the new schedule" in notes
    payload = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    assert (payload["epoch"], payload["it"]) == (2, 12)


def test_going_back_to_an_older_checkpoint_moves_the_newer_ones_aside(run_dir: Path) -> None:
    older = run_dir / "ckpt" / "checkpoint_epoch_1"
    before = load_weights_file(run_dir / "ckpt" / "checkpoint_epoch_2" / "checkpoint.pth")
    result = train(run_dir, resume=older)
    assert result.status == "finished"
    after = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    torch.testing.assert_close(after["model_state"], before["model_state"], rtol=0, atol=0)
    aside = list((run_dir / "ckpt" / "superseded").glob("*/*"))
    assert [path.name for path in aside] == ["checkpoint_epoch_2"]
    assert open_storage(str(run_dir)).exists("ckpt/checkpoint_epoch_2")


@pytest.mark.ray
def test_a_bare_file_of_ours_restores_all_and_says_what_could_not_be_compared(run_dir: Path, tmp_path: Path) -> None:
    bare = shutil.copy(run_dir / "ckpt" / "checkpoint_epoch_1" / "checkpoint.pth", tmp_path / "bare.pth")
    before = load_weights_file(run_dir / "ckpt" / "checkpoint_epoch_2" / "checkpoint.pth")
    result = train(run_dir, "EXTRA_TAG", "other", resume=str(bare))
    after = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    torch.testing.assert_close(after["model_state"], before["model_state"], rtol=0, atol=0)
    records = read_journal(Path(result.run_dir) / "journal.jsonl")
    assert any("no manifest" in r["message"] for r in records if r["kind"] == "event")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("place", [{"cursor": 48}, {"cursor": 10**30}, {"cursor": -4}, {"epoch": -1}, {"step": 1.5}])
def test_a_checkpoint_of_a_place_that_is_not_in_the_data_is_refused(
    run_dir: Path, tmp_path: Path, place: dict[str, Any], bare: bool
) -> None:
    storage, name = LocalStorage(run_dir), "ckpt/checkpoint_epoch_1"
    payload = load_weights_file(run_dir / name / "checkpoint.pth")
    payload["raytrain"]["progress"].update(place)
    write_checkpoint(storage, name, dumps(payload), read_manifest(storage, name))
    start = run_dir / name / "checkpoint.pth"
    if bare:
        start = Path(shutil.copy(start, tmp_path / "bare.pth"))
    with pytest.raises(ResumeError, match=r"which is no place in a data set of 48 samples\. What to do: go on from"):
        train(run_dir, "EXTRA_TAG", "other", resume=str(start))


def test_never_refuses_a_folder_with_a_run_in_it_unless_that_shall_give_way(run_dir: Path) -> None:
    with pytest.raises(ResumeError, match=r"--resume never: .* holds a run already.*--extra_tag.*--overwrite"):
        train(run_dir, resume="never")
    result = train(run_dir, resume="never", overwrite=True)
    records = read_journal(run_dir / "journal.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 25))
    assert result.status == "finished"
    assert len(list((run_dir / "ckpt" / "superseded").glob("*/*"))) == 2  # only the user deletes the only copy


def test_a_finished_run_taken_up_in_another_folder_is_saved_and_evaluated_there(run_dir: Path) -> None:
    before = load_weights_file(run_dir / "ckpt" / "checkpoint_epoch_2" / "checkpoint.pth")
    result = train(run_dir, "EXTRA_TAG", "other", resume=run_dir)
    assert result.status == "finished" and result.metrics
    after = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    torch.testing.assert_close(after["model_state"], before["model_state"], rtol=0, atol=0)
    assert train(run_dir, "EXTRA_TAG", "other").status == "complete"  # and not trained from step 0


def test_a_checkpoint_that_gave_way_to_one_which_the_journal_does_not_know_is_not_missed(tmp_path: Path) -> None:
    store = Store(open_storage(str(tmp_path)), CFG.CHECKPOINT, "first")
    told = [{"kind": "checkpoint", "time": 1.0, "name": f"checkpoint_step_{step}", "step": step} for step in (3, 6)]
    store.storage.write_bytes("journal.jsonl", "".join(f"{json.dumps(record)}\n" for record in told).encode())
    assert [name for name, _ in newest_to_trust(store)[1]] == ["checkpoint_step_6"]
    store.save(dumps({"model_state": {"w": torch.ones(2)}}), manifest(Progress(0, 9, 9)), now=1.0)
    found, passed_over = newest_to_trust(store)
    assert found is not None and not passed_over


@pytest.mark.parametrize(("fails_at", "goes_on"), [(0, False), (3, True)])
def test_a_failed_run_says_that_the_same_command_goes_on_where_there_is_a_checkpoint_for_it(
    fails_at: int, goes_on: bool, tmp_path: Path
) -> None:
    (tmp_path / "fail").write_text(str(fails_at))
    failing = {"TASK": "tasks_for_tests:Exact", "DATA_CONFIG": {"NUM_SAMPLES": 8, "GATE": str(tmp_path)}}
    cfg = Config.model_validate({**TREE, **failing, "OUTPUT": str(tmp_path / "output")})
    with pytest.raises(TrainingError, match=f"failed at step {fails_at}, as") as raised:
        raytrain.train(cfg, quiet=True)
    way_on = "\n\nThe same command goes on from the newest checkpoint"
    assert str(raised.value).endswith(way_on) == goes_on
    [failure] = [r for r in read_journal(next(tmp_path.rglob("journal.jsonl"))) if r.get("event") == "failure"]
    assert failure["message"].endswith(way_on) == goes_on


# What a run goes on to other bits by

EXACT = {"num_workers": 4, "virtual_workers": 8, "engine": "flat", "exact": True, "reduction": "shared memory"}
PLAIN = {**EXACT, "exact": False}


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        (EXACT, EXACT, []),
        (EXACT, {**EXACT, "num_workers": 1, "reduction": "none"}, []),
        (EXACT, {**EXACT, "engine": "ddp"}, ["engine was flat, now ddp: "]),
        (EXACT, PLAIN, ["this run was exact, and is not any more: "]),
        (PLAIN, EXACT, ["this run was not exact up to here; "]),
        (PLAIN, PLAIN, []),
        (PLAIN, {**PLAIN, "num_workers": 2}, ["num_workers was 4, now 2: "]),
        (PLAIN, {**PLAIN, "reduction": "collective"}, ["reduction was shared memory, now collective: "]),
        # older releases added in the order of ranks, which is the tree's for two
        ({"num_workers": 2, "virtual_workers": 2, "engine": "flat", "reduction": "shared memory"}, EXACT, []),
        ({"num_workers": 4, "virtual_workers": 4, "engine": "flat"}, EXACT, ["this run was not exact up to here; "]),
        ({"num_workers": 1, "virtual_workers": 1, "engine": "flat"}, EXACT, []),
    ],
)
def test_what_makes_a_run_go_on_to_other_bits_is_told(
    was: dict[str, Any], now: dict[str, Any], told: list[str]
) -> None:
    notes = other_bits(was, now)
    assert len(notes) == len(told) and all(map(str.startswith, notes, told))
