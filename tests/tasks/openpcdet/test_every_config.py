"""Every config of a checkout of OpenPCDet's trains, is evaluated and goes on to the same bits, on made-up scenes.

`PCDET_CHECKOUT=/path/to/OpenPCDet pytest -m pcdet`, where pcdet's requirements and spconv are installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import small_runs
import torch
from pcdet_made_up import small

from raytrain.config.load import load_config, with_values

TOOLS = Path(os.environ.get("PCDET_CHECKOUT", "")) / "tools"
CONFIGS = sorted(path.relative_to(TOOLS).as_posix() for path in TOOLS.glob("cfgs/*_models/*.yaml"))
# Why the others do not: docs/openpcdet.md.
NOT = {
    "kitti_models/CaDDN": "wants torchvision and a camera network's weights",
    "kitti_models/voxel_rcnn_car_focal_multimodal": "wants torchvision and a camera network's weights",
    "kitti_models/pillarnet": "its detector asks for boxes that only center heads give",
    "nuscenes_models/bevfusion": "wants a camera network's weights",
    "nuscenes_models/cbgs_voxel0075_voxelnext_doubleflip": "made for testing",
    "once_models/pointrcnn": "the made-up scenes have too few points",
    "waymo_models/PartA2": "a target of its loss lies outside 0 to 1 on the made-up scenes",
    "waymo_models/dsvt_voxel": "its attention mask is of a type that torch refuses",
    "waymo_models/mppnet_16frames": "wants stored boxes",
    "waymo_models/mppnet_4frames": "wants stored boxes",
    "waymo_models/mppnet_e2e_memorybank_inference": "wants stored boxes",
}


@pytest.mark.pcdet
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_is_evaluated_and_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    why = NOT.get(name.removeprefix("cfgs/").removesuffix(".yaml"))
    if why is not None:
        pytest.skip(why)

    def config(output: str):
        fixed = {"TASK": "pcdet_made_up:MadeUpTask", "OUTPUT": str(tmp_path / output), "SCALE.NUM_WORKERS": "0"}
        steps = {"OPTIMIZATION.NUM_EPOCHS": "2", "OPTIMIZATION.BATCH_SIZE_PER_GPU": "2", "LOADER.WORKERS": "0"}
        words = [word for pair in {**fixed, **steps, "SCALE.USE_GPU": "false"}.items() for word in pair]
        cfg = load_config(TOOLS / name, words)
        return with_values(cfg, small(cfg))

    straight = small_runs.train(config("straight"))
    weights = small_runs.saved_state(straight.checkpoint)
    assert "boxes" in small_runs.journal(straight.run_dir, "eval")[-1]["metrics"]
    small_runs.run_until(config("stopped"), stop_at=1)
    again = small_runs.saved_state(small_runs.train(config("stopped")).checkpoint)
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []
