"""`raytrain checkpoints A B`: whether two runs or checkpoints are the same bits, else what differs and by how much."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import s3_server
import torch
from small_runs import config, journal, train

from raytrain.cli import main
from raytrain.config.load import dump_config
from raytrain.config.sections import Checkpoint
from raytrain.launch import Result
from raytrain.progress import Progress
from raytrain.storage.checkpoint import WORLD, Manifest, read_manifest
from raytrain.storage.local import LocalStorage
from raytrain.storage.state_file import dumps
from raytrain.storage.storage import Storage, open_storage
from raytrain.storage.store import Store
from raytrain.training.comparison import Distance, compared, distance

POLICY = {"EVERY_STEPS": 2, "KEEP_LAST": 9}


def state(step: int, named: bool = True, **changes: torch.Tensor) -> dict[str, Any]:
    model = {"w": torch.arange(4.0) + step, "b": torch.ones(2), **changes}
    moments = {0: {"exp_avg": torch.ones(4)}, 1: {"exp_avg": torch.zeros(2)}}
    own = {"progress": {"epoch": 0, "cursor": step, "step": step}, **({"parameters": ["w", "b"]} if named else {})}
    return {
        "it": step,
        "model_state": model,
        "optimizer_state": {"state": moments, "param_groups": []},
        "raytrain": own,
    }


def save(storage: Storage, payload: dict[str, Any], seed: int = 0, workers: int = 1) -> str:
    """The path of a checkpoint in a run folder."""
    step = payload["it"]
    world = {**dict.fromkeys(WORLD, 1), "num_workers": workers, "exact": True}
    manifest = Manifest(Progress(0, step, step), {"SEED": seed, "OPTIMIZATION": {"LR": 0.1}}, world, seed)
    return Store(storage, Checkpoint(KEEP_LAST=99), "first").save(dumps(payload), manifest, 1.8e9).path


def runs(folder: Path, *changes: dict[str, Any]) -> list[str]:
    """Run folders with checkpoints at steps 1, 2 and 3; changes: of the tensors, by step."""
    for number, by_step in enumerate(changes):
        for step in (1, 2, 3):
            save(LocalStorage(folder / f"run{number}"), state(step, **by_step.get(step, {})), seed=number)
    return [str(folder / f"run{number}") for number in range(len(changes))]


def said(capsys: Any, *words: Any, status: int) -> list[str]:
    assert main(["checkpoints", *map(str, words)]) == status
    shown = capsys.readouterr()
    assert bool(shown.err) == (status == 2)
    return (shown.out + shown.err).splitlines()


def without_fingerprint(path: str) -> None:
    """As an earlier version has written it."""
    manifest = Path(path, "manifest.json")
    tree = json.loads(manifest.read_text())
    del tree["sha256"], tree["weights"]
    tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Runs of one task: twice the same, and two others."""
    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for name, seed, epochs in (("a", 1, 2), ("b", 1, 2), ("other", 2, 2)):
        cfg = config(folder, "PointsTask", {"NUM_EPOCHS": epochs}, SEED=seed, EXTRA_TAG=name, CHECKPOINT=POLICY)
        (folder / f"{name}.yaml").write_text(dump_config(cfg))
        made[name] = train(cfg)
    return made


def test_two_runs_of_one_config_have_one_fingerprint_everywhere(trained: dict[str, Result], capsys: Any) -> None:
    a, b = trained["a"], trained["b"]
    assert a.weights == b.weights and len(a.weights) == 64 and a.weights != trained["other"].weights
    lines = said(capsys, a.run_dir, b.run_dir, status=0)
    assert lines[:2] == [f"A  {a.run_dir}", f"B  {b.run_dir}"]
    assert lines[2].startswith("the same bits at step ") and f"weights {a.weights[:12]}; and at each step" in lines[2]
    assert lines[3:] == ["made with: the same config, seed, workers and code, as far as the manifests tell"]


def test_journal_manifest_listing_and_result_tell_it(trained: dict[str, Result], capsys: Any) -> None:
    run_dir, weights = trained["a"].run_dir, trained["a"].weights
    records = journal(run_dir, "checkpoint")
    kept = {record["name"]: record["weights"] for record in records}
    for name in kept:
        assert read_manifest(LocalStorage(Path(run_dir)), f"ckpt/{name}").weights == kept[name]
    assert records[-1]["weights"] == journal(run_dir, "end")[-1]["weights"] == weights
    listing = said(capsys, run_dir, status=0)
    assert weights[:12] in listing[1] and "weights" in listing[0]
    complete = dataclasses.replace(trained["a"], status="complete").lines()
    assert f"  weights      {weights[:12]}" in complete


def test_runs_that_part_are_told_from_which_step_on_and_why(trained: dict[str, Result], capsys: Any) -> None:
    lines = said(capsys, trained["a"].run_dir, trained["other"].run_dir, status=1)
    assert lines[2].startswith("not the same bits at step 2: weights ")
    assert lines[3] == "no step before it has a checkpoint in both"
    assert " tensors differ:" in lines[4]
    assert any(line.startswith(("  exp_avg of ", "  and ")) for line in lines[5:])
    assert "the newest that both have kept" in lines[-2]
    assert lines[-1] == "made with, A and B: seed 1 and 2"


def test_a_run_is_named_by_its_config_too(trained: dict[str, Result], capsys: Any) -> None:
    folder = Path(trained["a"].run_dir).parents[1]
    while not (folder / "a.yaml").exists():
        folder = folder.parent
    lines = said(capsys, folder / "a.yaml", folder / "b.yaml", status=0)
    assert lines[0] == f"A  {trained['a'].run_dir}"


def test_the_first_step_that_differs_is_told_with_tensors_and_distances(tmp_path: Path, capsys: Any) -> None:
    w = torch.tensor([2.0, 3.0, 4.5, -5.0])
    a, b = runs(tmp_path, {}, {2: {"w": w}, 3: {"w": torch.zeros(4), "b": torch.ones(3)}})
    lines = said(capsys, a, b, status=1)
    first = [read_manifest(LocalStorage(Path(run)), "ckpt/checkpoint_step_2").weights[:12] for run in (a, b)]
    assert lines[2:] == [
        f"not the same bits at step 2: weights {first[0]} and {first[1]}",
        "the same bits last at step 1",
        "1 of 4 tensors differ:",
        "     elements  at most  relative",
        "  w    2 of 4       10  2",
        "at step 3, the newest that both have kept, 2 tensors differ, by 6 at most",
        "made with, A and B: seed 0 and 1",
    ]


def test_names_shapes_and_dtypes_of_other_models_are_told(tmp_path: Path, capsys: Any) -> None:
    half = {"w": torch.ones(4).half(), "b": torch.ones(3), "only": torch.ones(1), "other.b": torch.ones(2)}
    a, b = runs(tmp_path, {3: {"gone": torch.ones(1)}}, {3: half})
    assert said(capsys, a, f"{b}/ckpt/checkpoint_step_3", status=1)[3:] == [
        "5 of 7 tensors differ:",
        "                              elements  at most  relative",
        "  w        float32 [4] and float16 [4]",
        "  b        float32 [2] and float32 [3]",
        "  gone                   only A has it",
        "  only                   only B has it",
        "  other.b                only B has it",
        "made with, A and B: seed 0 and 1",
    ]


def test_the_list_of_tensors_is_bounded_and_the_model_comes_first(tmp_path: Path, capsys: Any) -> None:
    many = {f"layer{n}": torch.ones(1) for n in range(12)}
    a = save(LocalStorage(tmp_path / "a"), state(1, **many))
    other = state(1, **{name: tensor + 1 for name, tensor in many.items()})
    other["optimizer_state"]["state"][0]["exp_avg"] += 1
    lines = said(capsys, a, save(LocalStorage(tmp_path / "b"), other, workers=2), status=1)
    assert lines[3] == "13 of 16 tensors differ:"
    assert [line.split()[0] for line in lines[5:15]] == list(many)[:10]
    assert lines[15:] == ["  and 3 more", "made with, A and B: num_workers 1 and 2"]


@pytest.mark.parametrize("form", ["folder", "file", "bare", "legacy", "without a fingerprint", "by number"])
def test_a_checkpoint_is_compared_in_any_form(tmp_path: Path, form: str, capsys: Any) -> None:
    a = save(LocalStorage(tmp_path / "a"), state(2))
    b = save(LocalStorage(tmp_path / "b"), state(2, named=form != "by number"), workers=2)
    if form == "without a fingerprint":
        without_fingerprint(b)
    elif form == "file":
        b += "/checkpoint.pth"
    elif form == "bare":
        b = shutil.copy(f"{b}/checkpoint.pth", tmp_path / "bare.pth")
    elif form == "legacy":
        torch.save(state(2), b := str(tmp_path / "legacy.pth"), _use_new_zipfile_serialization=False)
    lines = said(capsys, a, b, status=0)
    assert lines[2].startswith("the same bits at step 2: weights ")
    bare = form in ("bare", "legacy")
    assert lines[3].startswith("made with: not known of a file" if bare else "made with, A and B: num_workers 1 and 2")
    save(LocalStorage(tmp_path / "run"), state(1))
    save(LocalStorage(tmp_path / "run"), state(2, b=torch.tensor([1.0, float("nan")])))
    lines = said(capsys, tmp_path / "run", b, status=1)
    assert "  b    1 of 2  not finite  not finite" in lines


def test_old_runs_are_compared_by_reading_them(tmp_path: Path, capsys: Any) -> None:
    a, b = runs(tmp_path, {}, {3: {"w": torch.zeros(4)}})
    for path in Path(b, "ckpt").iterdir():
        without_fingerprint(str(path))
    lines = said(capsys, a, b, status=1)
    assert lines[2].startswith("not the same bits at step 3") and lines[3] == "the same bits last at step 2"


def test_runs_behind_uris_are_compared(capsys: Any) -> None:
    with s3_server.serving() as server:
        uris = [server.uri(f"bucket/output/{name}") for name in "ab"]
        for uri in uris:
            save(open_storage(uri), state(2))
        assert said(capsys, *uris, status=0)[2].startswith("the same bits at step 2")
        folder = server.uri("bucket/output/b/ckpt/checkpoint_step_2")
        assert said(capsys, uris[0], folder, status=0)[2].startswith("the same bits at step 2")
        file = server.uri("bucket/output/b/ckpt/checkpoint_step_2/checkpoint.pth")
        assert said(capsys, uris[0], file, status=0)[2].startswith("the same bits at step 2")


def damage(path: str) -> None:
    file = Path(path, "checkpoint.pth")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_an_error_and_vouches_for_nothing(tmp_path: Path, capsys: Any) -> None:
    a, b = runs(tmp_path, {}, {})
    damage(f"{b}/ckpt/checkpoint_step_3")
    (line,) = said(capsys, a, b, status=2)
    assert "checkpoint_step_3: checkpoint.pth is damaged: its sha256 is not what the manifest says" in line
    Path(b, "ckpt/checkpoint_step_3/manifest.json").unlink()
    lines = said(capsys, a, b, status=0)
    assert lines[2].startswith("the same bits at step 2")
    assert lines[-1].startswith(f"passed over {b}: ") and "manifest.json is missing" in lines[-1]
    (line,) = said(capsys, f"{a}/ckpt/checkpoint_step_3", f"{b}/ckpt/checkpoint_step_3", status=2)
    assert "checkpoint_step_3: manifest.json is missing" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}", "{a}/"], "A and B are both {a}; give two runs or checkpoints"),
        (["{a}/ckpt/checkpoint_step_1", "{a}/ckpt/checkpoint_step_1/checkpoint.pth"], "give two runs or checkpoints"),
        (["{a}", "{a}/nowhere"], "{a}/nowhere: there is no such folder"),
        (["{a}", "{a}/nothing.pth"], "{a}/nothing.pth: there is no such file"),
        (["{a}", "{tmp}"], "this holds several runs"),
        (["{a}", "{tmp}/empty"], "{tmp}/empty: this run has no checkpoint to compare"),
        (["{a}", "{tmp}/late"], "A has 1, 2, 3, B has 7. Train both with the same CHECKPOINT section"),
        (["{a}", "{tmp}/text.pth"], "text.pth: not a readable checkpoint"),
        (["{a}", "{tmp}/other.pth"], "other.pth: it should hold a dict with 'model_state'"),
        (["{a}", "{a}", "--verify"], "--verify is about one run"),
        (["{a}", "{a}", "--set", "SEED", "3"], "--set is about one run"),
        (["{a}", "{a}", "--extra_tag", "x"], "--extra_tag is about one run"),
    ],
)
def test_what_cannot_be_compared_is_told(tmp_path: Path, words: list[str], message: str, capsys: Any) -> None:
    (a,) = runs(tmp_path, {})
    (tmp_path / "empty/ckpt").mkdir(parents=True)
    save(LocalStorage(tmp_path / "late"), state(7))
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    (line,) = said(capsys, *(word.format(a=a, tmp=tmp_path) for word in words), status=2)
    assert message.format(a=a, tmp=tmp_path) in line


def test_nothing_is_written(tmp_path: Path) -> None:
    a, b = runs(tmp_path, {}, {2: {"w": torch.zeros(4)}})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not compared([a, b]).is_same
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), Distance(1, 2, 0.5, 0.2)),
        (torch.tensor([0.0, 2.0]), torch.tensor([-0.0, 2.0]), Distance(1, 2, 0.0, 0.0)),
        (torch.tensor([NAN, 2.0]), torch.tensor([NAN, 3.0]), Distance(1, 2, 1.0, 1 / 3)),
        (torch.tensor([NAN, 2.0]), torch.tensor([1.0, 2.0]), Distance(1, 2, None, None)),
        (torch.tensor(3), torch.tensor(5), Distance(1, 1, 2.0, 0.4)),
        (torch.tensor([True]), torch.tensor([False]), Distance(1, 1, 1.0, 1.0)),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), Distance(1, 1, 1.0, 1 / 5**0.5)),
        (torch.ones(2).bfloat16(), torch.tensor([1.0, 2.0]).bfloat16(), Distance(1, 2, 1.0, 0.5)),
        (torch.ones(2, 2).T, torch.tensor([[1.0, 1.0], [3.0, 1.0]]), Distance(1, 4, 2.0, 2 / 3)),
    ],
)
def test_a_difference_is_counted_by_bits_and_measured_by_value(
    a: torch.Tensor, b: torch.Tensor, found: Distance
) -> None:
    measured = distance(a, b)
    assert (measured.count, measured.of, measured.absolute) == (found.count, found.of, found.absolute)
    assert measured.relative == pytest.approx(found.relative)
