"""The driver while Ray trains: it shows what workers tell, passes on what is wished, and sees what becomes of nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from raytrain.cluster.cluster import Cluster
from raytrain.cluster.controller_status import ControllerStatus
from raytrain.cluster.growth import Growth
from raytrain.cluster.mailbox import Mailbox
from raytrain.cluster.resources import free_workers, node_address, wait_reason
from raytrain.journal.records import Record
from raytrain.keeper.watchdog import failure_by, hangs_here
from raytrain.progress import Progress
from raytrain.training.control import Judge, never_ends
from raytrain.training.job import Job

Show = Callable[[Record], None]

POLL_S = 0.2  # how often records are fetched from the workers
WAIT_NOTICE_S = 10.0  # how often a run that waits for resources says so
NODE_POLL_S = 2.0  # how often it is asked which nodes are to be taken away
# That the workers have trained before processes for a restart are made, which takes 3 s of CPU each: a short run is
# spared that. Where some have died others may, so then they are made sooner.
SPARES_S, SPARES_AFTER_DEATH_S = 10.0, 1.0
DEATH_HINT = (
    "The worker process died without a word. Most often the machine ran out of memory and the system killed it\n"
    "(`dmesg` tells: fewer workers, a smaller batch or LOADER.WORKERS 0 need less), or native code crashed."
)
NOTHING_TO_SAVE = "no worker trains at this moment, so there is nothing to save; the same command goes on"
RESUME_HINT = (
    "The same command goes on from the newest checkpoint; SCALE.MAX_FAILURES sets how often a run does so by itself."
)


def say(show: Show, event: str, message: str) -> None:
    """Shows an event that the driver itself tells of."""
    show({"kind": "event", "time": time.time(), "event": event, "message": message})


class Inbox:
    """What the workers post, shown once each in the order it was written.

    attempt: which start of the workers has posted last, as mailbox.current_attempt tells them; "" before the first
    begun:   whether the workers that were asked for last have
    """

    def __init__(self, mailbox: Mailbox, show: Show, judge: Judge = never_ends) -> None:
        self._mailbox, self.show, self._judge = mailbox, show, judge
        if judge is not never_ends:
            mailbox.put("judged", True)  # rank 0 then asks, and waits for the answer
        self.attempt, self.begun = "", False
        self._last_number = 0

    def expect_restart(self, why: str) -> None:
        """Others are started from here on, since these were asked to stop for it."""
        self._mailbox.remove("records")
        self.begun = False
        self._mailbox.put("planned", True)
        self.add_reason(why)

    def add_reason(self, why: str) -> None:
        """The workers are to be started again; rank 0 says so in the journal, from which it is shown here."""
        self._mailbox.put("restart_reasons", [*(self._mailbox.get("restart_reasons") or []), why])

    def fetch(self) -> None:
        posted = self._mailbox.get("records")
        if posted is None:
            return
        records = sorted(posted["records"], key=lambda record: record["number"])
        if posted["attempt"] != self.attempt:
            self.attempt, self._last_number = posted["attempt"], 0  # they count anew
        self.begun = True
        for record in records:
            if record["number"] > self._last_number:
                self._last_number = record["number"]
                self.show(record)

    def answer(self) -> None:
        """Rank 0's question, if there is one, whether the run is to go on after an evaluation."""
        question = self._mailbox.get("question") if self._judge is not never_ends else None
        if question is None:
            return
        self._mailbox.remove("question")
        goes_on = self._judge(Progress(**question["progress"]), question["metrics"])
        self._mailbox.put("answer", {"number": question["number"], "goes_on": goes_on})

    def say(self, event: str, message: str) -> None:
        say(self.show, event, message)


class Fit:
    """Ray Train's fit in a thread, which the one that calls `follow` attends to.

    failure: what there is to tell a user if it failed, else None;   raised: what it raised, if it did
    """

    def __init__(
        self,
        job: Job,
        trainer: Any,
        cluster: Cluster,
        per_worker: dict[str, float],
        inbox: Inbox,
        growth: Growth | None = None,
    ) -> None:
        scale = job.cfg.SCALE
        assert scale.NUM_WORKERS is not None  # Start.job has settled it
        self._job, self._trainer, self._inbox = job, trainer, inbox
        self._cluster, self._per_worker, self._growth = cluster, per_worker, growth
        self._num_workers, self._mailbox = scale.MIN_WORKERS or scale.NUM_WORKERS, Mailbox(job.launch)
        # Of an InDriverTrainer: Ray's own controller is an actor.
        self._controller: ControllerStatus | None = getattr(trainer, "controller_status", None)
        self._crowded = free_workers(per_worker) < self._num_workers
        self._notice_at, self._nodes_at, self._spares_at = time.monotonic() + WAIT_NOTICE_S, 0.0, 0.0
        # Attempts: the one that trains, the last one that was asked to stop for another, and why.
        self._training_attempt, self._leaving_attempt, self.move_reason = "", "", ""
        self.failure: dict[str, Any] | None = None
        self.raised: BaseException | None = None

    @property
    def was_moved(self) -> bool:
        """Whether the workers stopped because others are to go on: `move_reason`."""
        return self._controller is not None and self._leaving_attempt == self._controller.attempt != ""

    def follow(self, stop: threading.Event) -> str:
        """How it ended: "stopped", "finished", or "failed", as `failure` says."""
        thread = threading.Thread(target=self._run, name="raytrain-fit", daemon=True)
        thread.start()
        try:
            return self._attend(thread, stop)
        except BaseException:  # a second Ctrl-C, say: the run in that thread would go on where its cluster is gone
            if self._controller is not None:
                self._controller.abandoned.set()
            raise

    def _attend(self, thread: threading.Thread, stop: threading.Event) -> str:
        inbox, asked = self._inbox, False
        while thread.is_alive():
            thread.join(POLL_S)
            inbox.fetch()
            inbox.answer()
            now = time.monotonic()
            if self._controller is not None:
                self._watch_controller(self._controller, now)
            # Workers that have died wait too before they begin again; that only a controller in that thread can tell.
            if self._controller is None:
                waits = self._crowded and not inbox.begun
            else:
                waits = self._controller.waits_for_resources
            is_idle = waits or not inbox.begun
            if stop.is_set() and not asked:
                self._mailbox.put("stop", "signal to the driver")
                asked = True
                if not is_idle:
                    inbox.say("stopping", "the state is saved after the step under way; once more to stop at once")
            if asked and is_idle:
                # No worker trains; one that still does finds the wish in the mailbox.
                if self._controller is not None:
                    self._controller.abandoned.set()
                    thread.join()
                inbox.say("stopped", NOTHING_TO_SAVE)
                return "stopped"
            self._tell_of_waiting(waits, now)
        inbox.fetch()
        inbox.answer()  # those that were to stop may have ended before they were answered: others go on from there
        outcome = self._mailbox.get("outcome")
        if outcome is not None and self.raised is None:
            return str(outcome["status"])
        self.failure = self._first_failure()
        return "failed"

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.raised = error

    def _watch_controller(self, controller: ControllerStatus, now: float) -> None:
        """What died, which nodes go, and whether it is time for spare processes."""
        while not controller.restart_reasons.empty():
            reason, hangs = controller.restart_reasons.get(), hangs_here(self._job.run_uri)
            hung = "; ".join(f"rank {hang['rank']} hung in step {hang['step']}" for hang in hangs)
            self._inbox.add_reason(hung or reason)
        if self._inbox.attempt != self._training_attempt:
            self._spares_at = now + (SPARES_AFTER_DEATH_S if self._training_attempt else SPARES_S)
            self._training_attempt = self._inbox.attempt
        due = self._spares_at and now > self._spares_at and self._job.cfg.SCALE.MAX_FAILURES != 0
        if due and self._cluster.make_spares():
            self._spares_at = 0.0
        if self._leaving_attempt != controller.attempt:
            self._look_for_another_place(controller, now)

    def _look_for_another_place(self, controller: ControllerStatus, now: float) -> None:
        """The workers are asked to stop where a node of theirs goes, or more of them have room."""
        if not self._cluster.is_ours and now > self._nodes_at:
            self._nodes_at = now + NODE_POLL_S
            if leaving := controller.leaving_nodes():
                self._move(controller, "a node that they were on is taken away")
                self._inbox.say("preemption", leaving_message(leaving, time.time()))
                return
        trains = self._inbox.begun and self._inbox.attempt == controller.attempt
        if self._growth is None or not trains:
            return
        if self._growth.has_too_many(controller.num_workers):
            self._move(controller, "another trial of the sweep has a share")
        elif self._growth.is_ready(controller.num_workers, now):
            self._move(controller, "there is room for more")
            self._inbox.say("growth", "there is room for more workers; they join after the step under way")
        for note in self._growth.take_notes():
            self._inbox.say("note", note)

    def _move(self, controller: ControllerStatus, why: str) -> None:
        """The workers of now end with the step under way."""
        self._leaving_attempt, self.move_reason = controller.attempt, why
        self._mailbox.put(f"move-{controller.attempt}", why)
        self._mailbox.put(f"stop-{controller.attempt}", why)

    def _tell_of_waiting(self, waits: bool, now: float) -> None:
        if not waits:
            self._notice_at = now + WAIT_NOTICE_S
        elif now > self._notice_at:
            self._notice_at += WAIT_NOTICE_S
            self._inbox.say("waiting", wait_reason(self._per_worker, self._num_workers))

    def _first_failure(self) -> dict[str, Any]:
        """The failure to show: the first that a worker told of, since the others often only follow from it."""
        raised, mailbox = self.raised, self._mailbox
        last = "" if self._controller is None else f"{self._controller.attempt}-"
        failures = sorted((mailbox.get(key) for key in mailbox.keys(f"failure-{last}")), key=lambda each: each["time"])
        failures = [failure for failure in failures if failure["attempt"] == failures[-1]["attempt"]]
        own = [failure for failure in failures if not failure["lost_another"]]
        ends: dict[int, Exception] = getattr(raised, "worker_failures", {})
        silent = sorted(set(ends) - {failure["rank"] for failure in failures})
        give_up_reason = getattr(self._controller, "give_up_reason", "")
        if own and not silent:
            return {**own[0], "given_up": give_up_reason}
        for hang in hangs_here(self._job.run_uri):
            return {**failure_by(hang, self._job.run_uri), "given_up": give_up_reason or RESUME_HINT}
        last_words = str(getattr(raised, "controller_failure", raised) or "the workers ended without saying why")
        if silent:
            last_words = str(ends[silent[0]]).strip().splitlines()[-1]
        elif failures:
            last_words = failures[0]["error"]
        died = silent or failures or give_up_reason  # what others tell only follows from it
        text = f"{DEATH_HINT}\n{give_up_reason or RESUME_HINT}\n\nRay says: {last_words}" if died else last_words
        return {
            "rank": silent[0] if silent else None,
            "error": text,
            "traceback": text,
            "logs": f"{self._job.run_uri}/logs",
            "exit_status": 1,
            "expected": False,
            "given_up": "",
        }


def leaving_message(leaving: dict[str, int], now: float) -> str:
    """leaving: node ids, and when they go: milliseconds since 1970, 0 where that is not said.   now: seconds"""
    nodes = ", ".join(
        f"node {node_address(node)} is taken away" + (f" in {max(0.0, at / 1000 - now):.0f} s" if at else "")
        for node, at in sorted(leaving.items())
    )
    return f"{nodes}; the state is saved after the step under way, and the workers start again elsewhere"
