"""What comes from elsewhere can neither run code nor lead raytrain out of a run folder.

Pickle bombs, and tags that leave the output folder, as a user meets them: bad_inputs.yaml. That no module calls a
shell: guards/. That the cluster of a run listens on loopback only: promises/test_own_cluster.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_tasks
import pytest
import torch

from raytrain.config.load import load_config
from raytrain.config.sections import Checkpoint
from raytrain.errors import CheckpointError, ConfigError, RaytrainError, TaskError
from raytrain.journal.records import read_journal
from raytrain.journal.run_folder import run_dir_of
from raytrain.progress import Progress
from raytrain.storage.checkpoint import WORLD, Manifest, _tree_sha256, read_manifest
from raytrain.storage.local import LocalStorage
from raytrain.storage.state_file import dumps
from raytrain.storage.store import Store
from raytrain.sweep.tune import tune
from raytrain.training.checkpoints import survey
from raytrain.training.contract import pictures_of
from raytrain.training.preflight import LaunchOptions, find_start
from raytrain.training.resume import choose

LINES = "TASK: bad_tasks:Good\nOPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}\nSCALE: {NUM_WORKERS: 0}\n"
DEEP = 100_000


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """The store of a run folder with one checkpoint, beside a folder that is none of its business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.txt").write_text("mine")
    return with_checkpoint(Store(LocalStorage(tmp_path / "run"), Checkpoint(KEEP_LAST=1), "first"), 1)


def with_checkpoint(store: Store, epoch: int) -> Store:
    payload = {"epoch": epoch, "it": epoch, "model_state": {"w": torch.ones(4)}}
    store.save(dumps(payload), Manifest(Progress(epoch, 0, epoch), {}, dict.fromkeys(WORLD, 1), 0), now=1.8e9)
    return store


def outside(run: Store) -> dict[str, str]:
    """All files of the folder beside the run folder, with their content."""
    folder = Path(run.storage.path_of("")).parent / "outside"
    return {path.name: path.read_text() for path in folder.rglob("*")}


# Manifests


def names_a_file_outside(tree: dict[str, Any]) -> None:
    tree["files"]["../../../outside/precious.txt"] = {"size_bytes": 4, "sha256": "0" * 64}


def names_an_absolute_file(tree: dict[str, Any]) -> None:
    tree["files"]["/etc/passwd"] = {"size_bytes": 4, "sha256": "0" * 64}


def names_a_file_with_a_nul(tree: dict[str, Any]) -> None:
    tree["files"]["a\0b"] = {"size_bytes": 4, "sha256": "0" * 64}


def is_at_no_epoch(tree: dict[str, Any]) -> None:
    tree["progress"]["epoch"] = float("nan")


def is_at_an_endless_step(tree: dict[str, Any]) -> None:
    tree["progress"]["step"] = float("inf")


def is_at_a_step_too_large_to_reckon_with(tree: dict[str, Any]) -> None:
    tree["progress"]["step"] = 10**400


def is_at_a_text(tree: dict[str, Any]) -> None:
    tree["progress"]["cursor"] = "128"


def is_before_the_start(tree: dict[str, Any]) -> None:
    tree["progress"]["epoch"] = -1


def is_deep(tree: dict[str, Any]) -> None:
    tree["config"] = "DEEP"


def has_a_list_for_a_config(tree: dict[str, Any]) -> None:
    tree["config"] = [1]


def has_a_config_with_what_is_no_json(tree: dict[str, Any]) -> None:
    tree["config"] = {"LR": float("nan")}


def has_metrics_that_are_none(tree: dict[str, Any]) -> None:
    tree["metrics"] = {"accuracy": {"os.system": "ls"}}


EVIL = [
    *(names_a_file_outside, names_an_absolute_file, names_a_file_with_a_nul, is_at_no_epoch, is_at_an_endless_step),
    *(is_at_a_step_too_large_to_reckon_with, is_at_a_text, is_before_the_start, is_deep, has_a_list_for_a_config),
    *(has_a_config_with_what_is_no_json, has_metrics_that_are_none),
]


@pytest.mark.parametrize("evil", EVIL, ids=lambda evil: evil.__name__)
def test_a_manifest_from_elsewhere_is_damage_like_any_other(run: Store, evil: Callable[[dict[str, Any]], None]) -> None:
    path = "ckpt/checkpoint_epoch_1/manifest.json"
    tree = json.loads(run.storage.read_bytes(path))
    del tree["sha256"]
    evil(tree)
    text = json.dumps({**tree, "sha256": _tree_sha256(tree)})  # anybody can reckon it
    run.storage.write_bytes(path, text.replace('"DEEP"', '{"a":' * DEEP + "1" + "}" * DEEP).encode())
    before = outside(run)
    with pytest.raises(CheckpointError, match=r"/checkpoint_epoch_1: "):
        read_manifest(run.storage, "ckpt/checkpoint_epoch_1")
    with pytest.raises(CheckpointError, match="none of the checkpoints of this run can be trusted"):
        choose(run, "auto")
    assert not survey(run.storage, every_byte=True).usable
    assert [entry.name for entry in with_checkpoint(run, 2).listed()] == ["checkpoint_epoch_2"]  # retention goes on
    assert outside(run) == before


# Journals


@pytest.mark.parametrize(
    "record",
    [
        '{"kind": "checkpoint", "name": "../../outside"}',
        '{"kind": "checkpoint", "name": "../../nowhere"}',
        '{"kind": "checkpoint", "name": "/nowhere"}',
        '{"kind": "checkpoint", "name": "a\\u0000b"}',
        '{"kind": "checkpoint", "name": "%s"}' % ("x" * 5000),
        '{"kind": "checkpoint", "name": ["checkpoint_epoch_1"]}',
        '{"kind": "checkpoint"}',
        '{"kind": "checkpoint", "name": "checkpoint_epoch_9", "step": "9"}\n{"kind": "run", "step": 1}',
        '{"kind": "checkpoint", "name": "checkpoint_epoch_9", "step": NaN}\n{"kind": "run", "step": 1}',
        '{"kind": ["checkpoint"]}',
        '{"checkpoint":' * DEEP,
        '"checkpoint"',
    ],
)
def test_a_journal_from_elsewhere_is_read_for_what_it_knows_of_this_run(run: Store, record: str) -> None:
    run.storage.write_bytes("journal.jsonl", f"{record}\n".encode())
    origin = choose(run, "auto")
    assert origin is not None and (origin.name, origin.notes) == ("checkpoint_epoch_1", [])
    read_journal(str(run.storage.local_path("journal.jsonl")))
    assert survey(run.storage).usable


# Checkpoints by the names of their folders, and links


def test_a_folder_with_another_name_is_no_checkpoint(run: Store) -> None:
    digits = "1" * 200
    for name in (f"checkpoint_epoch_{digits}", "checkpoint_epoch_²", "checkpoint_epoch_1\n", "checkpoint_epoch_1 "):
        run.storage.makedirs(f"ckpt/{name}")
    assert [entry.name for entry in run.listed()] == ["checkpoint_epoch_1"]


def test_what_is_removed_is_a_link_and_not_what_it_leads_to(run: Store) -> None:
    root = Path(run.storage.path_of(""))
    before = outside(run)
    (root / "ckpt/checkpoint_epoch_1/more").symlink_to(root.parent / "outside")
    (root / "ckpt/checkpoint_epoch_0").symlink_to(root.parent / "outside")
    (root / "tensorboard").symlink_to(root.parent / "outside")
    assert [entry.name for entry in with_checkpoint(run, 2).listed()] == ["checkpoint_epoch_2"]
    cfg = load_config(written(root.parent), ["OUTPUT", str(root.parent), "TAG", "run", "EXTRA_TAG", "."])
    find_start(cfg, LaunchOptions(resume="never", overwrite=True))
    assert not (root / "tensorboard").is_symlink()
    assert outside(run) == before


def written(folder: Path) -> Path:
    """The YAML file of a run, in a folder of configs."""
    path = folder / "configs" / "run.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(LINES)
    return path


@pytest.mark.parametrize("name", ["journal.jsonl", ".lock", "logs/rank_0.log"])
def test_a_run_does_not_write_through_a_link(run: Store, name: str) -> None:
    root = Path(run.storage.path_of(""))
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(root.parent / "outside" / "precious.txt")
    cfg = load_config(written(root.parent), ["OUTPUT", str(root.parent), "TAG", "run", "EXTRA_TAG", "."])
    with pytest.raises(RaytrainError, match=r"this is a link to .*precious.txt, and would be written through"):
        find_start(cfg, LaunchOptions())
    assert outside(run) == {"precious.txt": "mine"}


@pytest.mark.parametrize("name", ["sweep.jsonl", ".lock", "logs/rank_0.log"])
def test_a_sweep_does_not_write_through_a_link(run: Store, name: str) -> None:
    root = Path(run.storage.path_of(""))
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(root.parent / "outside" / "precious.txt")
    words = ["OUTPUT", str(root.parent), "TAG", "run", "EXTRA_TAG", ".", "TUNE.SPACE.SEED", "{grid: [1, 2]}"]
    with pytest.raises(RaytrainError, match=r"this is a link to .*precious.txt, and would be written through"):
        tune(load_config(written(root.parent), words))
    assert outside(run) == {"precious.txt": "mine"}


@pytest.mark.parametrize("name", ["sweep.yaml", "best.yaml", "sweep.csv", "sweep.html"])
def test_a_file_of_a_sweep_that_is_written_whole_takes_the_place_of_a_link(run: Store, name: str) -> None:
    root = Path(run.storage.path_of(""))
    (root / name).symlink_to(root.parent / "outside" / "precious.txt")
    run.storage.write_bytes(name, b"new")
    assert ((root / name).read_text(), (root / name).is_symlink()) == ("new", False)
    assert outside(run) == {"precious.txt": "mine"}


# Names in a config


KEYS = ("TAG", "EXTRA_TAG", "EXP_GROUP_PATH")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/x", "a\0b", "a\nb", "\x1b[2Jx"])
def test_a_name_that_would_leave_the_output_folder_is_refused(tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(ConfigError, match="it must be a folder name below OUTPUT"):
        load_config(written(tmp_path), [key, json.dumps(name)])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "name", ["...", "~", "~root", "$HOME", "`ls`", "a;rm b", "-rf", r"a\..\..\b", "%2e%2e", "s3://b"]
)
def test_an_odd_name_is_a_folder_below_the_output_folder(tmp_path: Path, key: str, name: str) -> None:
    cfg = load_config(written(tmp_path), ["OUTPUT", str(tmp_path / "output"), key, json.dumps(name)])
    found = find_start(cfg, LaunchOptions()).run_dir
    assert Path(found).resolve().is_relative_to(tmp_path / "output")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["configs", "output"]


@pytest.mark.parametrize("name", ["x?endpoint_override=elsewhere", "x#y", "%2e%2e", "x/%2E%2E/%2E%2E"])
def test_a_name_cannot_say_where_the_storage_of_a_uri_is(tmp_path: Path, name: str) -> None:
    cfg = load_config(written(tmp_path), ["OUTPUT", "s3://bucket/runs?region=us-east-1", "EXTRA_TAG", name])
    with pytest.raises(ConfigError, match="as a part of the run folder would leave OUTPUT"):
        run_dir_of(cfg)


def test_a_very_long_name_is_an_error_that_says_so(tmp_path: Path) -> None:
    cfg = load_config(written(tmp_path), ["OUTPUT", str(tmp_path / "output"), "EXTRA_TAG", "x" * 5000])
    with pytest.raises(RaytrainError, match="File name too long"):
        find_start(cfg, LaunchOptions())


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", "a\0b", "a\n", ".hidden", "", "-rf"])
def test_a_picture_is_named_as_a_file_of_its_folder_or_not_taken(tmp_path: Path, name: str) -> None:
    class Drawing(bad_tasks.Good):
        def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Any:
            yield name, b""

    with pytest.raises(TaskError, match="named a picture"):
        list(pictures_of(Drawing(load_config(written(tmp_path))), [], bad_tasks.Points(2), 4, 0, 0))
