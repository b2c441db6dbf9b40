"""A run in worker processes of a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

from raytrain.cluster.cluster import Cluster, starting
from raytrain.cluster.driver import NOTHING_TO_SAVE, Fit, Inbox, Show, say
from raytrain.cluster.growth import Growth
from raytrain.cluster.local_cluster import TESTED, is_tested
from raytrain.cluster.mailbox import Mailbox
from raytrain.cluster.ray_worker import train_loop_per_worker, worker_callbacks
from raytrain.cluster.resources import check_reachable, check_resources, resolve_workers, resources_per_worker
from raytrain.cluster.restarts import RestartBudget
from raytrain.errors import PreflightError, as_seen
from raytrain.hash_seed import VARIABLE, hash_seed_to_hand_on
from raytrain.storage.lock import locked
from raytrain.storage.paths import parent_and_name
from raytrain.storage.storage import open_storage
from raytrain.training.control import Judge
from raytrain.training.job import Job
from raytrain.training.preflight import Start


def run_on_ray(start: Start, stop: threading.Event, show: Show, started: Cluster | None, judge: Judge) -> str:
    """The run on a Ray cluster, joined or started for it; how it ended."""
    # Or Ray would stumble over what another run is writing there.
    with locked(open_storage(start.run_dir), tell=functools.partial(say, show, "waiting")):
        pass
    with contextlib.ExitStack() as stack:
        options = start.options
        cluster = started or stack.enter_context(
            starting(options.address, dashboard=options.dashboard, scale=start.cfg.SCALE)
        )
        try:
            cluster.connect()
        except SystemExit:  # Ray's own answer to a SIGTERM while it starts
            say(show, "stopped", NOTHING_TO_SAVE)
            return "stopped"
        if cluster.note:
            say(show, "note", cluster.note)
        if cluster.dashboard_url:
            say(show, "dashboard", f"http://{cluster.dashboard_url}")
        num_workers, use_gpu = resolve_workers(start.cfg.SCALE, start.virtual_workers)
        job = start.job(num_workers, use_gpu)
        per_worker = resources_per_worker(job.cfg.SCALE, use_gpu)
        check_resources(job.cfg.SCALE.MIN_WORKERS or num_workers, per_worker)
        check_reachable(start.run_dir)
        cluster.wait_for_workers()
        if stop.is_set():
            say(show, "stopped", NOTHING_TO_SAVE)
            return "stopped"
        seats = seats_for(job, per_worker, options.share) if job.cfg.SCALE.is_elastic else None
        return train_on_ray(job, cluster, per_worker, stop, show, judge, seats)


def train_on_ray(
    job: Job,
    cluster: Cluster,
    per_worker: dict[str, float],
    stop: threading.Event,
    show: Show,
    judge: Judge,
    seats: Any = None,
) -> str:
    """The run in worker processes of a cluster, on others when their nodes are taken away; how it ended.

    seats: of an elastic run
    """
    mailbox, budget = Mailbox(job.launch), RestartBudget(job.cfg.SCALE.MAX_FAILURES)
    inbox, scale = Inbox(mailbox, show, judge), job.cfg.SCALE
    growth = Growth(seats, scale.GROW_EVERY, job.run_uri) if seats is not None else None
    try:
        while True:
            # Ray would take up from its own list, and start no run where that names a checkpoint that is removed.
            open_storage(job.run_uri).remove_tree("checkpoint_manager_snapshot.json")
            trainer = ray_trainer(job, per_worker, cluster.is_ours, budget, mailbox, seats)
            fit = Fit(job, trainer, cluster, per_worker, inbox, growth)
            status = fit.follow(stop)
            if fit.failure is not None:
                raise as_seen(fit.failure) from fit.raised
            if status != "stopped" or not fit.was_moved:
                return status
            if stop.is_set():
                say(show, "stopped", "the state is saved; the same command goes on")
                return status
            mailbox.remove("outcome")
            inbox.expect_restart(fit.move_reason)
    finally:
        if seats is not None:
            seats.release()
        mailbox.clear()


def check_elastic(scale: Any) -> None:
    """PreflightError where Ray is one whose private parts are not known."""
    if not is_tested():
        raise PreflightError(
            f"SCALE.MIN_WORKERS is {scale.MIN_WORKERS}, but runs are elastic with Ray {', '.join(TESTED)} only; "
            "install that, or give one number of workers (--num_workers)"
        )


def seats_for(job: Job, per_worker: dict[str, float], share: Callable[[], int] | None) -> Any:
    """The seats of an elastic run. share: of the trial of a sweep, which has its fewest in the group that it is in"""
    import ray

    scale = job.cfg.SCALE
    check_elastic(scale)
    from raytrain.cluster.seats import Seats

    assert scale.MIN_WORKERS is not None and scale.NUM_WORKERS is not None  # by which it is elastic
    reserved = None if share is None else ray.util.get_current_placement_group()
    return Seats(per_worker, scale.MIN_WORKERS, scale.NUM_WORKERS, job.virtual_workers, reserved, share)


def ray_trainer(
    job: Job, per_worker: dict[str, float], own_cluster: bool, budget: RestartBudget, mailbox: Mailbox, seats: Any
) -> Any:
    """Ray Train's TorchTrainer for `job`; its results lie in the run folder, under the run's own name.

    own_cluster: whether no one else uses the cluster
    budget, mailbox, seats: see controller.InDriverTrainer; where Ray's own trainer has to do, it counts all failures
    alike
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer_class: Callable[..., Any] = TorchTrainer
    config_class: Callable[..., Any] = TorchConfig
    if is_tested():
        from raytrain.cluster.controller import InDriverTrainer

        ours = {"own_cluster": own_cluster, "budget": budget, "mailbox": mailbox, "seats": seats}
        trainer_class = functools.partial(InDriverTrainer, **ours)
        if own_cluster:
            from raytrain.cluster.rendezvous import FileRendezvous

            config_class = FileRendezvous

    parent, name = parent_and_name(job.run_uri)
    scale = job.cfg.SCALE
    # Two workers that share a GPU cannot use NCCL, which refuses them.
    backend = "nccl" if job.use_gpu and scale.GPUS_PER_WORKER >= 1 else "gloo"
    return trainer_class(
        train_loop_per_worker,
        train_loop_config={"job": job},
        torch_config=config_class(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=scale.NUM_WORKERS or 1, use_gpu=job.use_gpu, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=scale.MAX_FAILURES or 0),
            callbacks=worker_callbacks(job),
            # For a cluster that was started elsewhere: the processes of our own have it from this one.
            worker_runtime_env={"env_vars": {VARIABLE: hash_seed_to_hand_on()}},
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )
