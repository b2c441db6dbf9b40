"""The mailbox between driver and workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from raytrain.cluster.mailbox import Mailbox


@pytest.fixture
def mailbox(ray_address: str) -> Iterator[Mailbox]:
    box = Mailbox("launch-a")
    yield box
    box.clear()


@pytest.mark.ray
def test_what_is_put_into_a_mailbox_comes_out_until_it_is_cleared(mailbox: Mailbox) -> None:
    assert mailbox.get("records") is None and mailbox.keys("") == []
    mailbox.put("records", [{"step": 1, "loss": 0.5, "note": "ä"}])
    mailbox.put("records", [{"step": 2, "loss": None, "note": "ä"}])  # the newest counts
    mailbox.put("failure-0", {"rank": 0})
    mailbox.put("failure-1", {"rank": 1})
    assert mailbox.get("records") == [{"step": 2, "loss": None, "note": "ä"}]
    assert mailbox.keys("failure-") == ["failure-0", "failure-1"]
    mailbox.clear()
    assert mailbox.get("records") is None and mailbox.keys("") == []


@pytest.mark.ray
def test_launches_do_not_read_each_others_mail(mailbox: Mailbox) -> None:
    other = Mailbox("launch-b")
    mailbox.put("stop", "signal to the driver")
    assert other.get("stop") is None
    other.clear()
    assert mailbox.get("stop") == "signal to the driver"


@pytest.mark.ray
def test_mail_arrives_in_other_processes(mailbox: Mailbox) -> None:
    import ray

    mailbox.put("stop", "please")

    def answer() -> str:
        box = Mailbox("launch-a")
        box.put("heard", f"{box.get('stop')}, yes")
        return "done"

    remote: Any = ray.remote(num_cpus=0)(answer)
    assert ray.get(remote.remote()) == "done"
    assert mailbox.get("heard") == "please, yes"
