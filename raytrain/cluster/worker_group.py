"""Ray Train's worker group in processes that stand already, with no actor beside the workers.

Private parts of Ray: only for the versions in local_cluster.TESTED.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.util import bundle_to_remote_args, time_monotonic
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrain.cluster.controller_status import ControllerStatus
from raytrain.cluster.mailbox import Mailbox, attempt_name
from raytrain.cluster.ray_worker import forget_run
from raytrain.cluster.seats import Seat, Seats

FORGET_S = 8.0  # a process that takes longer to end its part in a run, and to forget it, is not used again
SETTLE_S = 0.1  # until what killed workers had is free; Ray, asked before, looks again only after 0.3 to 0.5 s


class PrestartedWorkerGroup(WorkerGroup):
    """The workers in processes that stand already, and no actor beside them."""

    controller_status: ControllerStatus
    mailbox: Mailbox

    def _start_impl(self, builder: Any) -> None:
        context = self._worker_group_context
        self.controller_status.restarts = False
        for callback in self._callbacks:
            callback.before_worker_group_start(context)
        if self.controller_status.attempt:
            time.sleep(SETTLE_S)
        handle = self._create_placement_group(self._train_run_context.scaling_config, context)
        if not self.controller_status.wait_for_placement(handle, self._worker_group_start_timeout_s):
            handle.shutdown()
            raise WorkerGroupStartupTimeoutError(num_workers=context.num_workers)
        builder.with_placement_group_handle(handle)
        group, starts = handle.placement_group, self.mailbox.get("starts")
        self.controller_status.attempt = attempt_name(group.id.hex() if starts is None else "", starts)
        try:
            workers = self._create_workers(context.num_workers, group, context.resources_per_worker)
        except RayActorError as error:
            raise WorkerGroupStartupFailedError("a worker died before it was set up") from error
        builder.with_workers(workers)
        self.controller_status.nodes = frozenset(worker.metadata.node_id for worker in workers)
        self.controller_status.num_workers = len(workers)
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
    group_class: type[PrestartedWorkerGroup], status: ControllerStatus, its_mailbox: Mailbox, its_seats: Seats | None
) -> type[PrestartedWorkerGroup]:
    """The class whose groups write to `status`; Ray makes them, with arguments of its own."""

    class Group(group_class):  # type: ignore[misc, valid-type]
        controller_status, mailbox, seats = status, its_mailbox, its_seats

    return Group


def group_class(own_cluster: bool, is_elastic: bool) -> type[PrestartedWorkerGroup]:
    """own_cluster: on a cluster of the run's own. Else it is one that others use too, or the run is a sweep's trial."""
    if own_cluster:
        return ElasticWorkerGroup if is_elastic else PrestartedWorkerGroup
    if ray.util.get_current_placement_group() is None:
        return SharedClusterElasticGroup if is_elastic else SharedClusterWorkerGroup
    return ElasticTrialGroup if is_elastic else TrialWorkerGroup


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
        if not isinstance(self.placement_group_handle, SeatsOfGroup):  # which ends those that are to end
            for worker in self.workers:
                ray.kill(worker.actor)
        self.placement_group_handle.shutdown()


class ElasticWorkerGroup(PrestartedWorkerGroup):
    """In the seats of an elastic run, whose processes go on from one group to the next where nothing has failed."""

    seats: Seats

    def _create_placement_group(self, *unused: Any) -> Any:
        self.mailbox.put("starts", (self.mailbox.get("starts") or 0) + 1)
        return SeatsOfGroup(self.seats.taken[: self._worker_group_context.num_workers])

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, *unused: Any, **also_unused: Any
    ) -> list[Worker]:
        seats: list[Seat] = placement_group.seats
        self.controller_status.num_kept = sum(seat.actor is not None for seat in seats)
        actors = self.seats.occupy(seats, self._started_in)
        metadata = ray.get([actor.get_metadata.remote() for actor in actors])
        workers = [
            Worker(actor, of_actor, resources_per_worker, placement_group_bundle_index=seat.bundle)
            for seat, actor, of_actor in zip(seats, actors, metadata, strict=True)
        ]
        return WorkerGroup._assign_worker_ranks(workers)

    def _started_in(self, seat: Seat) -> Any:
        """A process for a worker, which has only begun to start."""
        runtime_env = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
        options = bundle_to_remote_args(self._worker_group_context.resources_per_worker)
        strategy = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.bundle)
        worker_class: Any = ray.remote(runtime_env=runtime_env, **options)(self._worker_cls)
        return worker_class.options(scheduling_strategy=strategy).remote()

    def shutdown(self) -> None:
        """The processes stay whose workers have stopped for others, or have only lost another; all others end."""
        status, state = self.controller_status, self._worker_group_state
        is_moved = self.mailbox.get(f"move-{status.attempt}") is not None
        if (
            state is not None
            and self.seats.can_keep
            and not status.abandoned.is_set()
            and (is_moved or status.restarts)
        ):
            failures = [self.mailbox.get(key) for key in self.mailbox.keys(f"failure-{status.attempt}-")]
            to_blame = {failure["rank"] for failure in failures if not failure["lost_another"]}
            blamed = [worker.actor for rank, worker in enumerate(state.workers) if rank in to_blame]
            seats: Any = state.placement_group_handle
            seats.keep([seat for seat in self.seats.taken if seat.actor not in (None, *blamed)])
        super().shutdown()


class SharedClusterElasticGroup(ElasticWorkerGroup):
    """As SharedClusterWorkerGroup."""

    _get_worker_runtime_env = staticmethod(WorkerGroup._get_worker_runtime_env)


class ElasticTrialGroup(ElasticWorkerGroup):
    """As TrialWorkerGroup, in what the trial owns and in its share of the rest."""

    _get_worker_runtime_env = staticmethod(TrialWorkerGroup._get_worker_runtime_env)


class SeatsOfGroup:
    """In place of a placement group: the seats of one group, which outlast it."""

    def __init__(self, seats: list[Seat]) -> None:
        self.placement_group, self.seats = self, seats
        self._kept: list[Seat] = []

    def wait(self, timeout_s: float) -> bool:
        return True

    def keep(self, seats: list[Seat]) -> None:
        """The processes in these forget the run, so that they can begin as new ones do; those that cannot will end."""
        forgetting = {seat.actor.execute.remote(forget_run): seat for seat in seats if seat in self.seats}
        done, _ = ray.wait(list(forgetting), num_returns=len(forgetting), timeout=FORGET_S) if forgetting else ([], [])
        for each in done:
            with contextlib.suppress(RayActorError, RayTaskError):
                if ray.get(each):
                    self._kept.append(forgetting[each])

    def shutdown(self) -> None:
        for seat in self.seats:
            if seat not in self._kept:
                seat.vacate()


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
