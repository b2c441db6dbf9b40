"""Checkpoints to OpenPCDet and from it: `raytrain checkpoints export` and `import`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from raytrain.config.heritage import SECTIONS
from raytrain.config.load import with_overrides
from raytrain.config.sections import Config
from raytrain.config.yaml_text import dump_tree
from raytrain.engine.determinism import device_here, prepare_torch, torch_put_back
from raytrain.engine.optim import in_legacy_groups
from raytrain.engine.own_state import OwnState
from raytrain.engine.randomness import seed_all
from raytrain.engine.state import RunState, build_run, manifest_of, payload_of, restore_heritage
from raytrain.engine.world import World
from raytrain.errors import CheckpointError, ResumeError, StorageError
from raytrain.journal.run_folder import check_writable, run_dir_of
from raytrain.storage.lock import locked, refuse_links
from raytrain.storage.state_file import dumps
from raytrain.storage.storage import open_storage
from raytrain.storage.store import Store
from raytrain.task import Task, make_task
from raytrain.training.resume import load_origin, origin_at
from raytrain.training.worker import build_datasets, plan_of


def export_checkpoint(source: str, folder: str | os.PathLike[str]) -> list[Path]:
    """A checkpoint of ours as the .pth and the YAML that OpenPCDet's train.py and test.py load; their paths.

    source: a checkpoint folder, or a run folder (its newest)
    The optimizer's state is left in OpenPCDet's groups, and so without parameters that it does not train.
    Raises RaytrainError.
    """
    origin = origin_at(source)
    if origin.manifest is None:
        raise ResumeError(f"{source}: it has no manifest, so how it was made is not known; name a checkpoint of a run")
    cfg = Config.model_validate(origin.manifest.config)
    payload = load_origin(origin)
    task, datasets = of_task(cfg)
    model = task.build_model(datasets["train"])
    content = {key: payload[key] for key in ("epoch", "it", "model_state", "version")}
    content["optimizer_state"] = in_legacy_groups(payload["optimizer_state"], model, cfg.OPTIMIZATION.OPTIMIZER)
    is_of_epoch = origin.manifest.progress.cursor == 0
    path = Path(folder) / (f"checkpoint_epoch_{content['epoch']}.pth" if is_of_epoch else "latest_model.pth")
    config = Path(folder) / f"{cfg.TAG}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        config.write_text(dump_tree(theirs(cfg)))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return [path, config]


def theirs(cfg: Config) -> dict[str, Any]:
    """The sections that OpenPCDet reads, without our nulls: there only what is absent has its default."""
    tree = {key: value for key, value in cfg.to_tree().items() if key in SECTIONS and value is not None}
    return {**tree, "OPTIMIZATION": {key: value for key, value in tree["OPTIMIZATION"].items() if value is not None}}


def import_checkpoint(source: str, cfg: Config) -> tuple[str, list[str]]:
    """A .pth of OpenPCDet as a checkpoint in the run folder of a config; its path, and what a user should know.

    Raises RaytrainError: CheckpointError too where the folder holds a checkpoint already.
    """
    origin = origin_at(source)
    payload = load_origin(origin)
    if "raytrain" in payload:
        raise ResumeError(f"{source}: this is a checkpoint of ours; --ckpt goes on from it")
    storage = open_storage(run_dir_of(cfg))
    store = Store(storage, cfg.CHECKPOINT, "")
    check_writable(storage)
    refuse_links(storage)
    with locked(storage), torch_put_back():
        if store.listed():
            raise CheckpointError(
                f"{storage.path_of('')} holds checkpoints already; give this one a folder of its own (--extra_tag NAME)"
            )
        run = built(cfg)
        notes = restore_heritage(run, payload, origin.path)
        saved = store.save(dumps(payload_of(run)), manifest_of(run, None), Path(origin.path).stat().st_mtime)
    return saved.path, [*origin.notes, *notes]


def built(cfg: Config) -> RunState:
    """A run of that config at step 0, in this process."""
    workers = cfg.SCALE.VIRTUAL_WORKERS or max(1, cfg.SCALE.NUM_WORKERS or 1)
    cfg = with_overrides(cfg, ["SCALE.VIRTUAL_WORKERS", str(workers), "OPTIMIZATION.SYNC_BN", "false"])
    task, datasets = of_task(cfg)
    world = World(virtual_workers=workers, device=device_here(cfg))
    prepare_torch(cfg, world.device)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    run.own = OwnState.of(task, datasets)
    return run


def of_task(cfg: Config) -> tuple[Task, dict[str, Any]]:
    """The task of a config, and its data sets by split."""
    seed_all(cfg.SEED, "task")
    task = make_task(cfg)
    return task, build_datasets(task, cfg.SEED)
