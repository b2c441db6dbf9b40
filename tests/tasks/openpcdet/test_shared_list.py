"""Lists of frames that loader workers share."""

import io
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from raytrain.tasks.openpcdet.shared_list import SharedList


def test_it_is_the_list_and_what_is_done_to_an_item_changes_none():
    items = [{"n": n, "boxes": np.full((n, 7), n)} for n in range(5)]
    shared = SharedList(items)
    assert len(shared) == 5 and [each["n"] for each in shared] == [0, 1, 2, 3, 4]
    assert shared[-1]["boxes"].shape == (4, 7) and [each["n"] for each in shared[1:3]] == [1, 2]
    shared[2]["boxes"][:] = 100
    assert (shared[2]["boxes"] == 2).all()
    with pytest.raises(IndexError):
        shared[5]
    assert len(SharedList([])) == 0 and list(SharedList([])) == []


def test_a_loader_worker_gets_a_handle_and_no_copy():
    """30,000 frames, as KITTI's and more: 99 MB a worker as a list."""
    boxes = np.zeros((10, 7))
    shared = SharedList([{"n": n, "boxes": boxes} for n in range(30000)])
    sent = io.BytesIO()
    ForkingPickler(sent).dump(shared)
    assert len(sent.getvalue()) < 4096
    assert ForkingPickler.loads(sent.getvalue())[29999]["n"] == 29999
