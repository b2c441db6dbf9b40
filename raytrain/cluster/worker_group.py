"""Ray Train's worker group in processes that stand already, with no actor beside the workers.

Private parts of Ray: only for the versions in local_cluster.TESTED.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.util import time_monotonic

from raytrain.cluster.controller_status import ControllerStatus
from raytrain.cluster.mailbox import Mailbox, attempt_name

SETTLE_S = 0.1  # until what killed workers had is free; Ray, asked before, looks again only after 0.3 to 0.5 s


class PrestartedWorkerGroup(WorkerGroup):
    """The workers in processes that stand already, and no actor beside them."""

    controller_status: ControllerStatus
    mailbox: Mailbox

    def _start_impl(self, builder: Any) -> None:
        context = self._worker_group_context
        for callback in self._callbacks:
            callback.before_worker_group_start(context)
        if self.controller_status.attempt:
            time.sleep(SETTLE_S)
        handle = self._create_placement_group(self._train_run_context.scaling_config, context)
        if not self.controller_status.wait_for_placement(handle, self._worker_group_start_timeout_s):
            handle.shutdown()
            raise WorkerGroupStartupTimeoutError(num_workers=context.num_workers)
        builder.with_placement_group_handle(handle)
        self.controller_status.attempt = attempt_name(handle.placement_group.id.hex(), self.mailbox.get("starts"))
        workers = self._create_workers(context.num_workers, handle.placement_group, context.resources_per_worker)
        builder.with_workers(workers)
        self.controller_status.nodes = frozenset(worker.metadata.node_id for worker in workers)
        self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(len(workers))}
        try:
            self._init_train_context(workers, SynchronizationWithoutActor())  # type: ignore[arg-type]
            state = ActorlessWorkerGroupState(time_monotonic(), handle, workers, None)  # type: ignore[arg-type]
            self._worker_group_state = state
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


def bound_group_class(
    group_class: type[PrestartedWorkerGroup], status: ControllerStatus, its_mailbox: Mailbox
) -> type[PrestartedWorkerGroup]:
    """The class whose groups write to `status`; Ray makes them, with arguments of its own."""

    class Group(group_class):  # type: ignore[misc, valid-type]
        controller_status, mailbox = status, its_mailbox

    return Group


def group_class(own_cluster: bool) -> type[PrestartedWorkerGroup]:
    """own_cluster: on a cluster of the run's own. Else it is one that others use too, or the run is a sweep's trial."""
    if own_cluster:
        return PrestartedWorkerGroup
    return SharedClusterWorkerGroup if ray.util.get_current_placement_group() is None else TrialWorkerGroup


class SharedClusterWorkerGroup(PrestartedWorkerGroup):
    """On a cluster that was started elsewhere, with an environment of its own: Ray hands on the driver's settings."""

    _get_worker_runtime_env = staticmethod(WorkerGroup._get_worker_runtime_env)


class TrialWorkerGroup(PrestartedWorkerGroup):
    """In the placement group that a sweep's trial owns: Ray Train would ask for another, and wait for ever."""

    def _create_placement_group(self, *unused: Any) -> Any:
        self.mailbox.put("starts", (self.mailbox.get("starts") or 0) + 1)
        return TrialPlacementGroup(ray.util.get_current_placement_group())

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """What the trial was handed on, as it is the driver of these: nothing, or what Ray hands on."""
        handed_on = ray.get_runtime_context().runtime_env.get("env_vars")
        return WorkerGroup._get_worker_runtime_env(custom_runtime_env) if handed_on else {}


class TrialPlacementGroup:
    """A placement group that stays when the workers in it end."""

    def __init__(self, group: Any) -> None:
        self.placement_group = group

    def wait(self, timeout_s: float) -> bool:
        return True

    def shutdown(self) -> None: ...


class ActorlessWorkerGroupState(WorkerGroupState):
    """Of a group without a synchronization actor to end, and without hooks to wait for."""

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
        self.placement_group_handle.shutdown()


class SynchronizationWithoutActor:
    """In place of the actor at which the ranks of ray.train.report and ray.train.collective meet.

    Reports need no meeting: each rank hands in its own, in one order. What a task's own code asks
    for meets by torch.
    """

    @property
    def broadcast_from_rank_zero(self) -> SynchronizationWithoutActor:
        return self

    def remote(self, *, data: Any, caller_method_name: str, **ranks: Any) -> Any:
        if caller_method_name == "ray.train.report":
            return ray.put(data)
        import torch.distributed as dist

        box = [data]
        dist.broadcast_object_list(box, src=0)
        return ray.put(box[0])
