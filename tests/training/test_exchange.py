"""Checkpoints both ways: OpenPCDet's own rules for groups and YAML, written down here, take what we export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tasks_for_units import PartlyLeftOutTask
from torch import nn

import raytrain
from raytrain.cli import main
from raytrain.config.load import dump_config, load_config
from raytrain.config.sections import Config
from raytrain.storage.state_file import load_weights_file
from raytrain.storage.storage import open_storage
from raytrain.storage.store import newest_verified

TREE: dict[str, Any] = {
    "TASK": "tasks_for_units:PartlyLeftOutTask",
    "TAG": "net",
    "MODEL": {"NAME": "Net", "NOTHING": None},
    "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 2, "OPTIMIZER": "adam_onecycle"},
    "SCALE": {"NUM_WORKERS": 0, "VIRTUAL_WORKERS": 1, "USE_GPU": False},
    "LOADER": {"WORKERS": 0},
}


def config(folder: Path, **optim: Any) -> Path:
    tree = {**TREE, "OUTPUT": str(folder / "output"), "OPTIMIZATION": {**TREE["OPTIMIZATION"], **optim}}
    (folder / "net.yaml").write_text(dump_config(Config.model_validate(tree)))
    return folder / "net.yaml"


def optimizer_of_openpcdet(model: nn.Module) -> torch.optim.Optimizer:
    """Groups as its OptimWrapper makes them: of modules without children, BatchNorm's apart."""
    leaves = [module for module in model.modules() if not list(module.children())]
    groups: list[list[nn.Parameter]] = [[], []]
    for module in leaves:
        groups[isinstance(module, nn.modules.batchnorm._BatchNorm)] += list(module.parameters())
    return torch.optim.Adam([{"params": group} for group in groups], lr=1e-3, betas=(0.9, 0.99))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[raytrain.Result, Path]:
    """A finished run, and the folder with what was exported of it."""
    result = raytrain.train(config(tmp_path), quiet=True)
    assert main(["checkpoints", "export", result.run_dir, "--to", str(tmp_path / "theirs")]) == 0
    return result, tmp_path / "theirs"


def test_what_is_exported_loads_as_openpcdet_loads_it(exported: tuple[raytrain.Result, Path]) -> None:
    result, folder = exported
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_epoch_2.pth", "net.yaml"]
    content = torch.load(folder / "checkpoint_epoch_2.pth")
    assert set(content) == {"epoch", "it", "model_state", "optimizer_state", "version"}
    assert (content["epoch"], content["it"]) == (2, 24)
    task = PartlyLeftOutTask(load_config(folder.parent / "net.yaml"))
    model = task.build_model(None)
    model.load_state_dict(content["model_state"])
    optimizer = optimizer_of_openpcdet(model)
    optimizer.load_state_dict(content["optimizer_state"])
    ours = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = dict(zip(ours["raytrain"]["parameters"], ours["optimizer_state"]["state"].values(), strict=True))
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(stepped) == len(moments) - 1  # the one that it never trains
    for parameter in stepped:
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], moments[names[parameter]]["exp_avg"])


def test_an_exported_yaml_has_no_null_of_ours_and_those_of_the_task(exported: tuple[raytrain.Result, Path]) -> None:
    tree = yaml.safe_load((exported[1] / "net.yaml").read_text())
    assert tree["OPTIMIZATION"].get("BETAS", (0.9, 0.99)) == (0.9, 0.99)  # as OpenPCDet asks
    assert None not in tree["OPTIMIZATION"].values() and tree["OPTIMIZATION"]["NUM_EPOCHS"] == 2
    assert tree["MODEL"] == {"NAME": "Net", "NOTHING": None} and set(tree) <= {
        *("CLASS_NAMES", "DATA_CONFIG", "MODEL", "OPTIMIZATION")
    }


def test_what_is_exported_is_imported_and_gone_on_from(exported: tuple[raytrain.Result, Path], tmp_path: Path) -> None:
    result, folder = exported
    path, file = str(config(tmp_path, NUM_EPOCHS=3)), str(folder / "checkpoint_epoch_2.pth")
    assert main(["checkpoints", "import", file, "--cfg_file", path, "--extra_tag", "taken"]) == 0
    newest, _ = newest_verified(open_storage(str(Path(result.run_dir).parent / "taken")))
    assert newest is not None and newest.manifest.progress.step == 24
    taken = load_weights_file(f"{newest.path}/checkpoint.pth")
    ours = load_weights_file(f"{result.checkpoint}/checkpoint.pth")
    assert all(torch.equal(taken["model_state"][name], value) for name, value in ours["model_state"].items())
    assert main(["train", "--cfg_file", path, "--extra_tag", "taken"]) == 0
    assert main(["checkpoints", "import", file, "--cfg_file", path, "--extra_tag", "taken"]) == 1  # it holds some


def test_what_openpcdet_never_trained_is_trained_from_here_on_and_said(
    exported: tuple[raytrain.Result, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cfg_file", str(config(tmp_path, NUM_EPOCHS=3)), "--ckpt", str(exported[1] / "checkpoint_epoch_2.pth")]
    assert main(["train", *words, "--extra_tag", "all"]) == 0
    assert "1 parameters that OpenPCDet leaves out of its groups are trained from here on" in capsys.readouterr().out
    legacy = ["--extra_tag", "legacy", "--set", "OPTIMIZATION.LEGACY_PARAM_GROUPS", "true"]
    assert main(["train", *words, *legacy]) == 0
    assert "are trained from here on" not in capsys.readouterr().out
    before = torch.load(exported[1] / "checkpoint_epoch_2.pth")["model_state"]["scale"]
    after = {
        tag: torch.load(tmp_path / "output" / "net" / tag / "ckpt" / "checkpoint_epoch_3" / "checkpoint.pth")
        for tag in ("all", "legacy")
    }
    assert torch.equal(after["legacy"]["model_state"]["scale"], before)
    assert not torch.equal(after["all"]["model_state"]["scale"], before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "nowhere"], "no such file or folder"),
        (["import", "x.pth"], "give --cfg_file YAML"),
        (["export", "x", "--cfg_file", "net.yaml"], "has its config with it"),
        (["run", "--to", "there"], "leave it out"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoints", *words]) == 2
    assert said in capsys.readouterr().err
