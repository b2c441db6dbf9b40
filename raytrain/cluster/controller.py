"""Ray Train with no process of its own beside the workers.

Ray's controller runs in a thread of the driver, with which the run ends anyway. The actors that share a cluster's
resources with Ray Data, that place its data sets and that tidy up after a controller are left out: this project
reads no Ray Data, and Ray itself ends a driver's workers with the driver. A run that joins a cluster begins 20 s
sooner for it. Workers that fail are started again as long as the run gets on. Private parts of Ray: only for the
versions in own_cluster.TESTED.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.util import ObjectRefWrapper, time_monotonic
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from raytrain.cluster.mailbox import Mailbox, named_attempt

SETTLED_S = 0.1  # until what killed workers had is free; Ray, asked before, looks again only after 0.3 to 0.5 s
LOOK_S = 1  # how often one that waits for room sees whether it still shall; Ray counts in whole seconds here

DEATHS = 2  # restarts without a new step, unless SCALE.MAX_FAILURES says otherwise: the third death there is the last


class Inside:
    """What goes on in the thread of Ray's controller, for the driver's own to look at, and its one wish.

    awaits_room: whether it is the cluster that keeps the workers from beginning, for the first time or again
    attempt:     which start of the workers this is, as cluster.attempt tells them; "" before the first
    nodes:       ids of the nodes that the workers are on
    died:        what ended the workers each time that they are started again, for the user
    given_up:    why they were not started again, for the user; "" if there is nothing to be said
    abandoned:   set once the run is not wanted any more
    """

    def __init__(self) -> None:
        self.awaits_room, self.attempt, self.nodes = False, "", frozenset[str]()
        self.died: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.given_up = ""
        self.abandoned = threading.Event()

    def room_comes(self, places: Any, patience_s: float) -> bool:
        """Whether `places`, a placement group, come to be before patience ends or the run is not wanted any more."""
        give_up = time.monotonic() + patience_s
        self.awaits_room = True
        try:
            while not self.abandoned.is_set() and time.monotonic() < give_up:
                if places.wait(LOOK_S):
                    return True
            return False
        finally:
            self.awaits_room = False

    def leaving_nodes(self) -> dict[str, int]:
        """Those of `nodes` that are taken away, and when: milliseconds since 1970, 0 where that is not said."""
        return {node: at for node, at in cluster_state.get_draining_nodes().items() if node in self.nodes}


class LeanTrainer(TorchTrainer):
    """A TorchTrainer that trains and reports as Ray's own does, and restarts within `budget`.

    alone:   on a cluster of the run's own, whose processes have the driver's environment
    mailbox: where its workers tell of their steps and failures
    """

    def __init__(self, *arguments: Any, alone: bool, budget: Budget, mailbox: Mailbox, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._group_class = group_class(alone)
        self._budget, self._mailbox = budget, mailbox
        self.inside = Inside()

    def fit(self) -> Any:
        """Returns None if it was abandoned."""
        log = logging.getLogger("ray.train")
        level = log.level
        log.setLevel(logging.CRITICAL)  # what goes wrong is raised, and shown by us
        try:
            return self._fit()
        finally:
            log.setLevel(level)

    def _fit(self) -> Any:
        scaling: Any = self.scaling_config  # the classes that ray.train shows are others to a type checker
        run: Any = self.run_config
        controller = LeanController(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()),
            train_run_context=self.train_run_context,
            scaling_policy=AloneScalingPolicy(scaling),
            failure_policy=AsLongAsItGetsOn(run.failure_config, self._budget, self._mailbox, self.inside),
            callbacks=[
                AcceleratorSetupCallback(self.backend_config, scaling),
                BackendUntilTheEnd(self.backend_config),
                *(run.callbacks or []),
            ],
        )
        controller.worker_group_cls = with_inside(self._group_class, self.inside, self._mailbox)
        asyncio.run(controller.run_until(self.inside.abandoned))
        if self.inside.abandoned.is_set():
            return None
        result = controller.get_result()
        if result.error:
            raise result.error
        return result


class AsLongAsItGetsOn(FailurePolicy):
    """Starts the workers again within a Budget, which counts failures without a new step between them.

    An error that explains itself (a config, a task, a run folder that is wrong) ends the run; a node that is taken
    away, and a wait for room, count for nothing.
    """

    def __init__(self, config: Any, budget: Budget, mailbox: Mailbox, inside: Inside) -> None:
        super().__init__(config)
        self._budget, self._mailbox, self._inside = budget, mailbox, inside

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        error = training_failed_error
        if isinstance(error, ControllerError):
            if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                return FailureDecision.RETRY
            if not isinstance(error.controller_failure, WorkerGroupStartupFailedError):
                return FailureDecision.RAISE
        ends = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        if any(_is_preempted_actor(end) for end in ends.values()):
            self._inside.died.put("the node of a worker was taken away")
            return FailureDecision.RETRY
        told = self._told()
        dead = sorted(rank for rank, end in ends.items() if is_death(end) and rank not in told)
        own = [failure for failure in told.values() if not failure["lost_another"]]
        if own and not dead and own[0]["expected"]:
            return FailureDecision.RAISE
        raised = bool(own) and not dead and not own[0]["lost_loader"]
        steps = [self._mailbox.get("step"), *(failure.get("step") for failure in told.values())]
        step = max((step for step in steps if step is not None), default=0)
        if not self._budget.allows(step, raised):
            self._inside.given_up = self._budget.why_not(raised)
            return FailureDecision.RAISE
        if dead:
            how = f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))} died without a word in step {step}"
        elif own:
            how = f"rank {own[0]['rank']} failed in step {step}: {own[0]['error'].splitlines()[0]}"
        else:
            how = f"a worker process died in step {step}"
        self._inside.died.put(how)
        return FailureDecision.RETRY

    def _told(self) -> dict[int, dict[str, Any]]:
        """By rank, in the order of time, what the workers of this attempt have told of their end."""
        found = [self._mailbox.get(key) for key in self._mailbox.keys(f"failure-{self._inside.attempt}-")]
        return {failure["rank"]: failure for failure in sorted(found, key=lambda failure: failure["time"])}


def is_death(error: Exception) -> bool:
    """Whether it says that a worker's process has ended, or answers no more."""
    if isinstance(error, WorkerHealthCheckFailedError):
        return isinstance(error.health_check_failure, RayActorError)
    return isinstance(error, (RayActorError, WorkerHealthCheckTimeoutError))


class BackendUntilTheEnd(BackendSetupCallback):
    """Process groups end with their processes; taking one down whose peer is dead takes up to half a minute."""

    def before_execution_group_shutdown(self, execution_group: Any) -> None: ...


class AloneScalingPolicy(FixedScalingPolicy):
    """Asks no one for room: the placement group does, and waits for it."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class LeanWorkerGroup(WorkerGroup):
    """The workers in processes that stand already, and no actor beside them."""

    inside: Inside
    mailbox: Mailbox

    def _start_impl(self, builder: Any) -> None:
        context = self._worker_group_context
        for callback in self._callbacks:
            callback.before_worker_group_start(context)
        if self.inside.attempt:
            time.sleep(SETTLED_S)
        places = self._create_placement_group(self._train_run_context.scaling_config, context)
        if not self.inside.room_comes(places, self._worker_group_start_timeout_s):
            places.shutdown()
            raise WorkerGroupStartupTimeoutError(num_workers=context.num_workers)
        builder.with_placement_group_handle(places)
        self.inside.attempt = named_attempt(places.placement_group.id.hex(), self.mailbox.get("starts"))
        workers = self._create_workers(context.num_workers, places.placement_group, context.resources_per_worker)
        builder.with_workers(workers)
        self.inside.nodes = frozenset(worker.metadata.node_id for worker in workers)
        self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(len(workers))}
        try:
            self._init_train_context(workers, OrderOfReports())  # type: ignore[arg-type]
            self._worker_group_state = LeanState(time_monotonic(), places, workers, None)  # type: ignore[arg-type]
            for callback in self._callbacks:
                callback.after_worker_group_start(self)
            ray.get([worker.actor.run_train_fn.remote(context.train_fn_ref) for worker in workers])
        except (RayActorError, RayTaskError) as error:  # one that died, or that met no other
            self._clear_state()  # or Ray would leave what has started as it is
            for worker in builder.workers:
                ray.kill(worker.actor)
            builder.with_workers([])
            raise WorkerGroupStartupFailedError("a worker died while it was set up") from error
        for callback in self._callbacks:
            callback.after_worker_group_training_start(self)

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, arguments: dict[str, list[Any]]) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,  # asked only by ray.train.get_all_reported_checkpoints
                    **{name: values[i] for name, values in arguments.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """None, or a process that stands could not be used: what Ray would hand on was inherited from the driver."""
        return {}


def with_inside(group_class: type[LeanWorkerGroup], shown: Inside, letters: Mailbox) -> type[LeanWorkerGroup]:
    """The class whose groups are seen in `shown`; Ray makes them, with arguments of its own."""

    class Group(group_class):  # type: ignore[misc, valid-type]
        inside, mailbox = shown, letters

    return Group


def group_class(alone: bool) -> type[LeanWorkerGroup]:
    """alone: on a cluster of the run's own. Else it is one that others use too, or a sweep's trial, in its places."""
    if alone:
        return LeanWorkerGroup
    return JoinedWorkerGroup if ray.util.get_current_placement_group() is None else TrialsWorkerGroup


class JoinedWorkerGroup(LeanWorkerGroup):
    """On a cluster that was started elsewhere, with an environment of its own: Ray hands on the driver's settings."""

    _get_worker_runtime_env = staticmethod(WorkerGroup._get_worker_runtime_env)


class TrialsWorkerGroup(LeanWorkerGroup):
    """In the places that a sweep's trial owns: Ray Train would ask for others, beside them, and wait for ever."""

    def _create_placement_group(self, *unused: Any) -> Any:
        self.mailbox.put("starts", (self.mailbox.get("starts") or 0) + 1)
        return TrialsPlaces(ray.util.get_current_placement_group())

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """What the trial was handed on, as it is the driver of these: nothing, or what Ray hands on."""
        handed_on = ray.get_runtime_context().runtime_env.get("env_vars")
        return WorkerGroup._get_worker_runtime_env(custom_runtime_env) if handed_on else {}


class TrialsPlaces:
    """A placement group that stays when the workers in it end."""

    def __init__(self, group: Any) -> None:
        self.placement_group = group

    def wait(self, timeout_s: float) -> bool:
        return True

    def shutdown(self) -> None: ...


class LeanState(WorkerGroupState):
    """Of a group without a synchronization actor to end, and without hooks to wait for."""

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        self.placement_group_handle.shutdown()


class LeanController(TrainController):
    """Ray's controller, as an object of the driver."""

    async def run_until(self, abandoned: threading.Event) -> None:
        while not self.get_state().is_terminal():
            await self._run_control_loop_iteration()
            if abandoned.is_set():
                if self._worker_group is not None and self._worker_group.has_started():
                    self._shutdown_worker_group()
                return


class OrderOfReports:
    """In place of the actor at which the ranks of ray.train.report and ray.train.collective meet.

    Reports need no meeting: each rank hands in its own, in one order. What a task's own code asks
    for meets by torch.
    """

    @property
    def broadcast_from_rank_zero(self) -> OrderOfReports:
        return self

    def remote(self, *, data: Any, caller_method_name: str, **ranks: Any) -> Any:
        if caller_method_name == "ray.train.report":
            return ray.put(data)
        import torch.distributed as dist

        box = [data]
        dist.broadcast_object_list(box, src=0)
        return ray.put(box[0])


@dataclasses.dataclass
class Budget:
    """Counts failures in a row that came without a new step between them.

    max_failures: SCALE.MAX_FAILURES: restarts without a new step, -1 for any number. None: DEATHS of them where a
                  process has died, none where the task's own code has raised: it would again
    furthest:     the last step in which any attempt has failed, from 1; 0 before the first
    """

    max_failures: int | None
    furthest: int = -1
    in_a_row: int = 0

    def allows(self, step: int, raised: bool) -> bool:
        """Whether the workers are to be started again after this failure, in `step`; `raised` by the task's code."""
        self.in_a_row = self.in_a_row + 1 if step <= self.furthest else 1
        self.furthest = max(step, self.furthest)
        limit = self.limit(raised)
        return limit == -1 or self.in_a_row <= limit

    def limit(self, raised: bool) -> int:
        if self.max_failures is not None:
            return self.max_failures
        return 0 if raised else DEATHS

    def why_not(self, raised: bool) -> str:
        """For the user, after `allows` has said no: why the workers are not started again, and what to do."""
        if self.limit(raised) == 0:
            return ""
        place = f"step {self.furthest}" if self.furthest > 0 else "the start"
        return (
            f"It failed {self.in_a_row} times in a row without getting beyond {place}, so it was given up:\n"
            "what fails again and again is no accident. Once it is mended the same command goes on from the newest\n"
            "checkpoint. SCALE.MAX_FAILURES sets how often a run does so by itself (-1: without end)."
        )
