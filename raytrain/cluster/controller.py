"""Ray's controller, replaced by one that needs no process beside the workers.

Ray's controller runs in a thread of the driver, with which the run ends anyway. The actors that share a cluster's
resources with Ray Data, that place its data sets and that tidy up after a controller are left out: this project
reads no Ray Data, and Ray itself ends a driver's workers with the driver. A run that joins a cluster begins 20 s
sooner for it. Workers that fail are started again as long as the run makes progress. Private parts of Ray: only for the
versions in local_cluster.TESTED.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

from ray.exceptions import RayActorError
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2._internal.util import ObjectRefWrapper
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from raytrain.cluster.controller_status import ControllerStatus
from raytrain.cluster.mailbox import Mailbox
from raytrain.cluster.restarts import RestartBudget
from raytrain.cluster.seats import Seats
from raytrain.cluster.worker_group import bound_group_class, group_class

LOOK_S = 1.0  # how often an elastic run that has too little room looks for more


class InDriverTrainer(TorchTrainer):
    """A TorchTrainer that trains and reports as Ray's own does, and restarts within `budget`.

    own_cluster: whether it is on a cluster of the run's own, whose processes have the driver's environment
    mailbox:     where its workers tell of their steps and failures
    seats:       of an elastic run
    """

    def __init__(
        self,
        *args: Any,
        own_cluster: bool,
        budget: RestartBudget,
        mailbox: Mailbox,
        seats: Seats | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._group_class = group_class(own_cluster, seats is not None)
        self._budget, self._mailbox, self._seats = budget, mailbox, seats
        self.controller_status = ControllerStatus()

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
        status, seats = self.controller_status, self._seats
        controller = InDriverController(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()),
            train_run_context=self.train_run_context,
            scaling_policy=ElasticPolicy(scaling, seats, status) if seats else PlacementGroupScalingPolicy(scaling),
            failure_policy=RestartPolicy(run.failure_config, self._budget, self._mailbox, status, seats),
            callbacks=[
                AcceleratorSetupCallback(self.backend_config, scaling),
                BackendWithoutTeardown(self.backend_config),
                *(run.callbacks or []),
            ],
        )
        controller.worker_group_cls = bound_group_class(self._group_class, status, self._mailbox, seats)
        asyncio.run(controller.run_until(status.abandoned))
        if status.abandoned.is_set():
            return None
        result = controller.get_result()
        if result.error:
            raise result.error
        return result


class RestartPolicy(FailurePolicy):
    """Starts the workers again within a RestartBudget, which counts failures without a new step between them.

    An error that explains itself (a config, a task, a run folder that is wrong) ends the run; a node that is taken
    away, and a wait for room, count for nothing.
    """

    def __init__(
        self, config: Any, budget: RestartBudget, mailbox: Mailbox, status: ControllerStatus, seats: Seats | None = None
    ) -> None:
        super().__init__(config)
        self._budget, self._mailbox, self._status, self._seats = budget, mailbox, status, seats

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        decision = self._decision_on(training_failed_error)
        self._status.restarts = decision == FailureDecision.RETRY
        return decision

    def _decision_on(self, error: Any) -> FailureDecision:
        if isinstance(error, ControllerError):
            if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                return FailureDecision.RETRY
            if not isinstance(error.controller_failure, WorkerGroupStartupFailedError):
                return FailureDecision.RAISE
        errors = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        if any(map(_is_preempted_actor, errors.values())):
            self._status.restart_reasons.put("the node of a worker was taken away")
            return FailureDecision.RETRY
        failures = self._failures()
        dead = sorted(rank for rank, worker_error in errors.items() if is_death(worker_error) and rank not in failures)
        own = [failure for failure in failures.values() if not failure["lost_another"]]
        if own and not dead and own[0].get("step") is None and self._status.num_kept and self._seats:
            # The user's modules, imported a second time in one process, may have failed for that alone.
            self._status.num_kept = 0
            self._seats.can_keep = False
            self._status.restart_reasons.put("a process that trained before could not again; now all are new")
            return FailureDecision.RETRY
        if own and not dead and own[0]["expected"]:
            return FailureDecision.RAISE
        raised = bool(own) and not dead and not own[0]["lost_loader"]
        steps = [self._mailbox.get("step"), *(failure.get("step") for failure in failures.values())]
        step = max((step for step in steps if step is not None), default=0)
        if not self._budget.allows(step, raised):
            self._status.give_up_reason = self._budget.why_not(raised)
            return FailureDecision.RAISE
        if dead:
            how = f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))} died without a word in step {step}"
        elif own:
            how = f"rank {own[0]['rank']} failed in step {step}: {own[0]['error'].splitlines()[0]}"
        else:
            how = f"a worker process died in step {step}"
        self._status.restart_reasons.put(how)
        return FailureDecision.RETRY

    def _failures(self) -> dict[int, dict[str, Any]]:
        """By rank, in the order of time, what the workers of this attempt have told of their end."""
        failures = [self._mailbox.get(key) for key in self._mailbox.keys(f"failure-{self._status.attempt}-")]
        return {failure["rank"]: failure for failure in sorted(failures, key=lambda failure: failure["time"])}


def is_death(error: Exception) -> bool:
    """Whether it says that a worker's process has ended, or answers no more."""
    if isinstance(error, WorkerHealthCheckFailedError):
        return isinstance(error.health_check_failure, RayActorError)
    return isinstance(error, (RayActorError, WorkerHealthCheckTimeoutError))


class BackendWithoutTeardown(BackendSetupCallback):
    """Process groups end with their processes; taking one down whose peer is dead takes up to half a minute."""

    def before_execution_group_shutdown(self, execution_group: Any) -> None: ...


class PlacementGroupScalingPolicy(FixedScalingPolicy):
    """Asks no one for room: the placement group does, and waits for it."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class ElasticPolicy(PlacementGroupScalingPolicy):
    """As many workers as there are seats for; while those are too few it looks again and again."""

    def __init__(self, config: Any, seats: Seats, status: ControllerStatus) -> None:
        super().__init__(config)
        self._seats, self._status = seats, status

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._status.waits_for_resources = not self._seats.take()
        if self._status.waits_for_resources:
            self._status.abandoned.wait(LOOK_S)
            return NoopDecision()
        return ResizeDecision(num_workers=len(self._seats.taken), resources_per_worker=self._seats.per_worker)


class InDriverController(TrainController):
    """Ray's controller, as an object of the driver."""

    async def run_until(self, abandoned: threading.Event) -> None:
        while not self.get_state().is_terminal():
            await self._run_control_loop_iteration()
            if abandoned.is_set():
                if self._worker_group is not None and self._worker_group.has_started():
                    self._shutdown_worker_group()
                return
