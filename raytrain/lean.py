"""Ray Train with no process of its own beside the workers.

Ray's controller runs in a thread of the driver, with which the run ends anyway. The actors that share a cluster's
resources with Ray Data, that place its data sets and that tidy up after a controller are left out: this project
reads no Ray Data, and Ray itself ends a driver's workers with the driver. A run that joins a cluster begins 20 s
sooner for it. Private parts of Ray: only for the versions in own_cluster.TESTED.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import create_failure_policy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState, _shutdown_workers
from ray.train.v2._internal.util import ObjectRefWrapper, time_monotonic
from ray.train.v2.torch.torch_trainer import TorchTrainer

LOOK_S = 1  # how often one that waits for room sees whether it still shall; Ray counts in whole seconds here


class Room:
    """The wait for room on the cluster, for all workers at once; another thread may look at it, and end it.

    is_awaited: whether that lasts
    abandoned:  set once the run is not wanted any more
    """

    def __init__(self) -> None:
        self.is_awaited, self.abandoned = False, threading.Event()

    def comes(self, places: Any, patience_s: float) -> bool:
        """Whether `places`, a placement group, come to be before patience ends or the run is not wanted any more."""
        give_up = time.monotonic() + patience_s
        self.is_awaited = True
        try:
            while not self.abandoned.is_set() and time.monotonic() < give_up:
                if places.wait(LOOK_S):
                    return True
            return False
        finally:
            self.is_awaited = False


class LeanTrainer(TorchTrainer):
    """A TorchTrainer that trains, restarts and reports as Ray's own does; `abandon` ends `fit` before it has begun.

    alone: on a cluster of the run's own, whose processes have the driver's environment
    """

    def __init__(self, *arguments: Any, alone: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._group_class = LeanWorkerGroup if alone else JoinedWorkerGroup
        self._room = Room()

    @property
    def awaits_room(self) -> bool:
        """Whether it is the cluster that keeps the workers from beginning, for the first time or again."""
        return self._room.is_awaited

    def abandon(self) -> None:
        """Let `fit` return at the next pause of its loop, with the workers ended."""
        self._room.abandoned.set()

    def fit(self) -> Any:
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
            failure_policy=create_failure_policy(run.failure_config),
            callbacks=[
                AcceleratorSetupCallback(self.backend_config, scaling),
                BackendSetupCallback(self.backend_config),
                *(run.callbacks or []),
            ],
        )
        controller.worker_group_cls = in_room(self._group_class, self._room)
        asyncio.run(controller.run_until(self._room.abandoned))
        if self._room.abandoned.is_set():
            return None
        result = controller.get_result()
        if result.error:
            raise result.error
        return result


class AloneScalingPolicy(FixedScalingPolicy):
    """Asks no one for room: the placement group does, and waits for it."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class LeanWorkerGroup(WorkerGroup):
    """The workers in processes that stand already, and no actor beside them."""

    room: Room

    def _start_impl(self, builder: Any) -> None:
        context = self._worker_group_context
        for callback in self._callbacks:
            callback.before_worker_group_start(context)
        places = self._create_placement_group(self._train_run_context.scaling_config, context)
        if not self.room.comes(places, self._worker_group_start_timeout_s):
            places.shutdown()
            raise WorkerGroupStartupTimeoutError(num_workers=context.num_workers)
        builder.with_placement_group_handle(places)
        workers = self._create_workers(context.num_workers, places.placement_group, context.resources_per_worker)
        builder.with_workers(workers)
        self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(len(workers))}
        try:
            self._init_train_context(workers, OrderOfReports())  # type: ignore[arg-type]
            self._worker_group_state = LeanState(time_monotonic(), places, workers, None)  # type: ignore[arg-type]
            for callback in self._callbacks:
                callback.after_worker_group_start(self)
        except RayActorError as error:
            raise WorkerGroupStartupFailedError("a worker died while it was set up") from error
        ray.get([worker.actor.run_train_fn.remote(context.train_fn_ref) for worker in workers])
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


def in_room(group_class: type[LeanWorkerGroup], wanted: Room) -> type[LeanWorkerGroup]:
    """The class whose groups wait in `wanted`; Ray makes them, with arguments of its own."""

    class Group(group_class):  # type: ignore[misc, valid-type]
        room = wanted

    return Group


class JoinedWorkerGroup(LeanWorkerGroup):
    """On a cluster that was started elsewhere, with an environment of its own: Ray hands on the driver's settings."""

    _get_worker_runtime_env = staticmethod(WorkerGroup._get_worker_runtime_env)


class LeanState(WorkerGroupState):
    """Of a group without a synchronization actor to end."""

    def shutdown(self) -> None:
        _shutdown_workers(self.workers)
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
