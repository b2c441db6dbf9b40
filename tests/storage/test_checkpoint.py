"""One checkpoint: it comes back bit for bit, every kind of damage is named, and no code in it is run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raytrain
from raytrain.errors import CheckpointError, StorageError
from raytrain.progress import Progress
from raytrain.storage.arrow import ArrowStorage
from raytrain.storage.checkpoint import (
    WORLD,
    Manifest,
    is_verified,
    read_manifest,
    verify_checkpoint,
    write_checkpoint,
    write_metrics,
)
from raytrain.storage.fingerprint import fingerprint_of
from raytrain.storage.local import LocalStorage
from raytrain.storage.state_file import dumps, load_payload, load_weights_file
from raytrain.storage.storage import Storage, open_storage

A_WORLD = dict.fromkeys(WORLD, 1)
WORLD_OF_TWO = {**A_WORLD, "num_workers": 2}


def payload(step: int = 7, width: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "epoch": 1,
        "it": step,
        "model_state": OrderedDict(weight=torch.randn(width, width, generator=generator)),
        "optimizer_state": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1}]},
        "version": f"raytrain+{raytrain.__version__}",
        "raytrain": {"rng": torch.get_rng_state(), "scaler": None, "best": 0.5},
    }


def manifest(step: int = 7, **metrics: Any) -> Manifest:
    return Manifest(
        Progress(1, 24, step),
        {"SEED": 3, "MODEL": {"D": {1: "one"}}},
        WORLD_OF_TWO,
        3,
        metrics,
    )


@pytest.fixture(params=["local", "arrow file", "arrow memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path)
    import pyarrow.fs

    if request.param == "arrow file":
        return ArrowStorage(pyarrow.fs.LocalFileSystem(), str(tmp_path), f"file://{tmp_path}")
    return ArrowStorage(pyarrow.fs._MockFileSystem(), "bucket", "mock://bucket")


def test_a_checkpoint_comes_back_bit_for_bit(storage: Storage) -> None:
    written = write_checkpoint(storage, "ckpt/one", dumps(payload()), manifest(accuracy=0.75))
    assert storage.list("ckpt") == ["one"]
    assert storage.list("ckpt/one") == ["checkpoint.pth", "manifest.json"]
    found = verify_checkpoint(storage, "ckpt/one")
    assert found.files == written.files
    assert found.progress == Progress(1, 24, 7)
    assert found.metrics == {"accuracy": 0.75}
    assert found.config == {"SEED": 3, "MODEL": {"D": {"1": "one"}}}
    assert found.version == raytrain.__version__
    back = load_payload(storage, "ckpt/one")
    assert list(back) == ["epoch", "it", "model_state", "optimizer_state", "version", "raytrain"]
    assert torch.equal(back["model_state"]["weight"], payload()["model_state"]["weight"])
    assert back["optimizer_state"]["param_groups"] == [{"lr": 0.1}]


def test_a_checkpoint_of_the_same_name_takes_the_place_of_the_old_one(storage: Storage) -> None:
    write_checkpoint(storage, "ckpt/one", dumps(payload()), manifest(7))
    write_checkpoint(storage, "ckpt/one", dumps(payload(8)), manifest(8))
    assert verify_checkpoint(storage, "ckpt/one").progress.step == 8
    assert load_payload(storage, "ckpt/one")["it"] == 8
    assert storage.list("ckpt") == ["one"]


def test_a_manifest_holds_the_fingerprint_of_the_tensors_and_an_older_one_none(tmp_path: Path) -> None:
    storage, data = LocalStorage(tmp_path), dumps(payload())
    written = write_checkpoint(storage, "one", data, manifest())
    assert written.weights == read_manifest(storage, "one").weights == fingerprint_of(memoryview(data)) != ""
    write_metrics(storage, "one", {"accuracy": 0.5})
    assert read_manifest(storage, "one").weights == written.weights
    path = tmp_path / "one" / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"], tree["weights"], tree["source"]
    tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(tree))
    older = verify_checkpoint(storage, "one")
    assert (older.weights, older.source, older.metrics) == ("", {}, {"accuracy": 0.5})


def test_plain_torch_loads_it_with_weights_only(tmp_path: Path) -> None:
    write_checkpoint(LocalStorage(tmp_path), "one", dumps(payload()), manifest())
    assert torch.load(tmp_path / "one/checkpoint.pth", weights_only=True)["it"] == 7


def test_metrics_of_any_number_type_are_kept_and_what_is_not_finite_is_none() -> None:
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": float("nan"), "d": float("inf"), "e": 3}
    tree = json.loads(manifest(**metrics).to_json())
    assert tree["metrics"] == {"a": 0.5, "b": 2.0, "c": None, "d": None, "e": 3.0}


def torn(folder: Path) -> None:
    (folder / "checkpoint.pth").write_bytes((folder / "checkpoint.pth").read_bytes()[:100])


def emptied(folder: Path) -> None:
    (folder / "checkpoint.pth").write_bytes(b"")


def flipped(folder: Path) -> None:
    data = bytearray((folder / "checkpoint.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "checkpoint.pth").write_bytes(data)


def missing_payload(folder: Path) -> None:
    (folder / "checkpoint.pth").unlink()


def missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-20])


def zeroed_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(bytes(500))


def edited_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"step": 7', '"step": 9'))


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')


def list_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def gone(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


DAMAGE = [
    (torn, r"checkpoint.pth has 100 bytes, its manifest says \d+"),
    (emptied, r"checkpoint.pth has 0 bytes, its manifest says \d+"),
    (flipped, "checkpoint.pth is damaged: its sha256 is not what the manifest says"),
    (missing_payload, "checkpoint.pth is missing"),
    (missing_manifest, "manifest.json is missing, so it was never finished"),
    (torn_manifest, "manifest.json is damaged: it is not a manifest of raytrain"),
    (zeroed_manifest, "manifest.json is damaged"),
    (edited_manifest, "manifest.json is damaged: its content does not match its own sha256"),
    (foreign_manifest, "manifest.json is damaged: it lacks 'sha256'"),
    (list_manifest, "manifest.json is damaged: it is not a manifest of raytrain"),
    (gone, "manifest.json is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    storage = LocalStorage(tmp_path)
    write_checkpoint(storage, "one", dumps(payload()), manifest())
    damage(tmp_path / "one")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/one: {message}"):
        verify_checkpoint(storage, "one")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/one: {message}"):
        load_payload(storage, "one")


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_checkpoint(storage, "one", dumps(payload()), manifest(accuracy=0.5))
    whole = read_manifest(storage, "one")
    chosen = random.Random(0)
    for file in ("checkpoint.pth", "manifest.json"):
        path = tmp_path / "one" / file
        data = path.read_bytes()
        for _ in range(150):
            bit = chosen.randrange(len(data) * 8)
            flip = bytearray(data)
            flip[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flip)
            if is_verified(storage, "one"):  # white space and \uXXXX of the manifest may be written differently
                assert file == "manifest.json" and read_manifest(storage, "one") == whole
        path.write_bytes(data)
    assert is_verified(storage, "one")


def test_a_bad_sector_is_damage_of_this_checkpoint(tmp_path: Path) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs a file whose reading fails: /proc/self/mem")
    storage = LocalStorage(tmp_path)
    facts = {"size_bytes": 0, "sha256": "0" * 64}
    (tmp_path / "one").mkdir()
    (tmp_path / "one/checkpoint.pth").symlink_to("/proc/self/mem")
    text = Manifest(Progress(), {}, A_WORLD, 0, files={"checkpoint.pth": facts}).to_json()
    (tmp_path / "one/manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"/one: .*checkpoint.pth: cannot read: Input/output error"):
        verify_checkpoint(storage, "one")


def test_files_that_no_manifest_lists_are_ignored(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_checkpoint(storage, "one", dumps(payload()), manifest())
    (tmp_path / "one/notes.txt").write_text("mine")
    assert is_verified(storage, "one")


def test_a_manifest_that_lists_no_payload_vouches_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/manifest.json").write_text(manifest().to_json())
    with pytest.raises(CheckpointError, match=r"it does not list checkpoint.pth"):
        verify_checkpoint(LocalStorage(tmp_path), "one")


@pytest.mark.parametrize("replaces", [False, True])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path, replaces: bool) -> None:
    storage = open_storage(str(tmp_path))
    if replaces:
        write_checkpoint(storage, "one", dumps(payload()), manifest())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"checkpoint.pth: cannot write: File too large. Free some space"):
            write_checkpoint(storage, "one", dumps(payload(8, width=500)), manifest(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.list("") == (["one"] if replaces else [])
    assert not replaces or verify_checkpoint(storage, "one").progress.step == 7


def test_state_that_could_not_be_loaded_again_is_refused_when_saving(storage: Storage) -> None:
    for bad, message in (
        (np.float64(1), "numpy.*which loading would refuse"),
        (Path("/x"), "pathlib.*which loading would refuse"),
        (lambda: 1, "the state cannot be saved"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(storage, "one", dumps({**payload(), "raytrain": {"mine": bad}}), manifest())
    assert storage.list("") == []


def openpcdet_payload() -> dict[str, Any]:
    moments = {"step": 5, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    group = {"lr": np.float64(0.003), "betas": (np.float64(0.95), 0.99), "eps": 1e-8, "params": [0]}
    return {
        "epoch": 3,
        "it": 21,
        "model_state": OrderedDict(weight=torch.arange(4.0), global_step=torch.zeros(1, dtype=torch.int64)),
        "optimizer_state": {"state": {0: moments}, "param_groups": [group, {**group, "params": [1]}]},
        "version": "pcdet+0.6.0+1234567",
    }


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy format", "zip format"])
def test_a_checkpoint_of_openpcdet_loads_with_its_numpy_scalars(tmp_path: Path, zipped: bool) -> None:
    torch.save(openpcdet_payload(), tmp_path / "checkpoint_epoch_3.pth", _use_new_zipfile_serialization=zipped)
    back = load_weights_file(tmp_path / "checkpoint_epoch_3.pth")
    assert back["it"] == 21
    assert torch.equal(back["model_state"]["weight"], torch.arange(4.0))
    assert back["optimizer_state"]["param_groups"][0]["lr"] == 0.003


def test_numpy_scalars_load_under_the_names_of_numpy_1_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(openpcdet_payload(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_weights_file(path)["optimizer_state"]["param_groups"][1]["betas"][0] == 0.95


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy format", "zip format"])
def test_a_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    bomb = {"model_state": {"w": Bomb(tmp_path / "boom")}}
    torch.save(bomb, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil.pth: refused, because loading it would call posix\.mkdir"):
        load_weights_file(tmp_path / "evil.pth")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable checkpoint: EOFError"),
        (b"not a checkpoint at all", "not a readable checkpoint"),
        (b"PK\x03\x04 torn zip", "not a readable checkpoint"),
        (bytes(1000), "not a readable checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x.pth: {message}"):
        load_weights_file(tmp_path / "x.pth")


def test_a_weights_file_without_model_state_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"should hold a dict with 'model_state', but holds the keys \['state_"):
        load_weights_file(tmp_path / "x.pth")
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="but holds a list"):
        load_weights_file(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"none.pth: cannot be read: No such file"):
        load_weights_file(tmp_path / "none.pth")


def test_our_own_file_given_by_its_path_is_still_checked_against_its_manifest(tmp_path: Path) -> None:
    write_checkpoint(LocalStorage(tmp_path), "one", dumps(payload()), manifest())
    assert load_weights_file(tmp_path / "one/checkpoint.pth")["it"] == 7
    flipped(tmp_path / "one")
    with pytest.raises(CheckpointError, match="its sha256 is not what the manifest says"):
        load_weights_file(tmp_path / "one/checkpoint.pth")
