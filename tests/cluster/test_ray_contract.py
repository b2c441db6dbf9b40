"""What cluster/ assumes of Ray's private parts: a new version of Ray fails here, and says which module to look at.

Once all of it holds again, and tests/promises with it, the version goes into local_cluster.TESTED.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import ray
import ray.train.torch.config as torch_config
from ray._private import auto_init_hook, ray_constants, services, state, worker
from ray._private.authentication import authentication_token_setup
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.state import GlobalState
from ray.core.generated import gcs_pb2
from ray.exceptions import RayActorError, RayTaskError
from ray.experimental import internal_kv
from ray.train.v2._internal import callbacks, constants, exceptions
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainContext, get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext, WorkerGroupState
from ray.train.v2._internal.execution.worker_group.thread_runner import ThreadRunner
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import ObjectRefWrapper, bundle_to_remote_args
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray_contract import Dependent

import raytrain
from raytrain.cluster.cluster import RAY_SETTINGS
from raytrain.cluster.local_cluster import IDLE, SYSTEM_CONFIG, TESTED, is_tested
from raytrain.cluster.seats import NODE_ID

RAYLET = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"


def test_the_installed_version_is_one_whose_private_parts_were_read() -> None:
    assert is_tested(), (
        f"ray {ray.__version__} is not in raytrain.cluster.local_cluster.TESTED {TESTED}: runs do with Ray's public "
        "parts, slower. Mend what else fails in this file, and add the version there"
    )


def test_the_processes_of_a_node() -> None:
    node = Dependent("cluster/local_cluster.py")
    why = "it starts a node without what a run does not need"
    node.calls(Node, why, RayParams(), head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)
    options = ("num_cpus", "include_dashboard", "include_log_monitor", "no_monitor", "temp_dir", "env_vars")
    node.calls(RayParams, why, **dict.fromkeys((*options, "_system_config")))
    node.overrides(Node.start_api_server, why, "self", "include_dashboard", "raise_on_failure")
    node.has(Node, why, "_webui_url", "all_processes", "gcs_address", "get_session_dir_path")
    node.holds(ray_constants.PROCESS_TYPE_RAYLET == "raylet", "it asks all_processes for it", "the raylet's name")
    node.has(services.ProcessInfo, "it ends the processes of a node itself", "process")


def test_how_many_processes_a_node_starts_at_once() -> None:
    node = Dependent("cluster/local_cluster.py")
    why = "the processes for workers start with the node, as many as its num_cpus says at the start"
    node.overrides(Node.get_resource_and_label_spec, why, "self")
    node.has(ResourceAndLabelSpec, why, "num_cpus", "to_resource_dict")
    node.mentions(Node.start_raylet, why, "get_resource_and_label_spec()")
    node.mentions(services.start_raylet, why, "resource_and_label_spec.to_resource_dict()", "num_cpus")
    spec = ResourceAndLabelSpec
    node.calls(spec.to_resource_dict, why, ...)
    raylet = RAYLET.read_bytes()
    for key in (*SYSTEM_CONFIG, "preload_python_modules"):
        node.holds(key.encode() in raylet, f"it sets {key}", f"the raylet has no {key}")
    node.holds(
        ray_constants.WORKER_PROCESS_TYPE_IDLE_WORKER == IDLE,
        "it counts the processes without work by their name",
        f"that is {ray_constants.WORKER_PROCESS_TYPE_IDLE_WORKER}",
    )


def test_how_a_node_ends() -> None:
    node = Dependent("cluster/local_cluster.py")
    why = "it ends the processes itself: they are deaf to the SIGTERM by which Ray would ask"
    node.calls(Node.kill_all_processes, why, ..., check_alive=False, allow_graceful=True)
    node.replaces(Node._kill_process_type, why, "8f54e4590f1b")
    node.mentions(ray.shutdown, why, "_global_node.kill_all_processes(")
    node.mentions(
        services.start_ray_process, "the kernel ends them with the driver", "set_kill_on_parent_death_linux()"
    )
    node.has(worker, "it finds the node of a cluster with a dashboard there", "_global_node")


def test_what_a_node_listens_on_and_asks_for() -> None:
    node = Dependent("cluster/local_cluster.py")
    why = "a node of a run listens on loopback alone"
    node.has(ray_constants, why, "ENABLE_RAY_CLUSTER")
    node.mentions(services.get_node_ip_address, why, "if not ray_constants.ENABLE_RAY_CLUSTER")
    why = "who reaches the ports of a node could else run code"
    node.calls(authentication_token_setup.enable_token_auth_by_default, why)
    node.calls(authentication_token_setup.ensure_token_if_auth_enabled, why, create_token_if_missing=True)


def test_how_a_cluster_on_this_machine_is_found() -> None:
    why = "--address auto looks for the processes of nodes by it"
    Dependent("cluster/address.py").mentions(
        services, why, '_find_address_from_flag("--gcs-address")', "_is_raylet_process("
    )


def test_what_ray_starts_by_itself() -> None:
    why = "no thread that outlives its cluster is to start another"
    Dependent("cli.py").mentions(auto_init_hook, why, 'os.environ.get("RAY_ENABLE_AUTO_CONNECT", "") != "0"')


def test_what_ray_prints_of_workers_that_die() -> None:
    node = Dependent("cluster/local_cluster.py")
    why = "it keeps what the raylet says off the screen"
    node.overrides(worker.print_to_stdstream, why, "data", "ignore_prefix")
    node.mentions(worker.listen_error_messages, why, '"pid": "raylet"', "print_to_stdstream(")


@pytest.mark.parametrize("name", RAY_SETTINGS)
def test_the_settings_in_the_environment(name: str) -> None:
    package = Path(ray.__file__).parent
    modules = ("train/v2/_internal/constants.py", "train/constants.py", "_private/ray_constants.py")
    others = ("_private/accelerators/accelerator.py", "_common/usage/usage_constants.py")
    code = [(package / module).read_text() for module in (*modules, *others)]
    Dependent("cluster/cluster.py").holds(
        any(f'"{name}"' in text for text in code), "it sets it, for silence and speed", f"nobody reads {name}"
    )


def test_the_key_value_store() -> None:
    mailbox = Dependent("cluster/mailbox.py")
    why = "workers and driver leave messages for each other there"
    mailbox.calls(internal_kv._internal_kv_put, why, "key", "value", overwrite=True, namespace="space")
    mailbox.calls(internal_kv._internal_kv_get, why, "key", namespace="space")
    mailbox.calls(internal_kv._internal_kv_list, why, "prefix", namespace="space")
    mailbox.calls(internal_kv._internal_kv_del, why, "prefix", del_by_prefix=True, namespace="space")


def test_the_controller_of_a_run() -> None:
    controller = Dependent("cluster/controller.py")
    why = "it runs Ray's controller in a thread of the driver"
    names = ("train_fn_ref", "train_run_context", "scaling_policy", "failure_policy", "callbacks")
    controller.calls(TrainController, why, **dict.fromkeys(names))
    for method in ("_run_control_loop_iteration", "get_state", "get_result", "_shutdown_worker_group"):
        controller.calls(getattr(TrainController, method), why, ...)
    controller.holds(
        inspect.iscoroutinefunction(TrainController._run_control_loop_iteration), why, "its loop is no coroutine"
    )
    controller.has(TrainController, why, "worker_group_cls", "_worker_group")
    controller.replaces(TrainController.run, why, "356ad0bf0049")
    controller.calls(TorchTrainer._get_train_func, why, ...)
    controller.has(TorchTrainer, why, "train_run_context", "scaling_config", "run_config", "backend_config")
    controller.replaces(TorchTrainer.fit, why, "5d2b8d40bfcb")
    controller.calls(ObjectRefWrapper, why, print)


def test_when_workers_are_started_again() -> None:
    controller = Dependent("cluster/controller.py")
    why = "it decides for itself which failures end a run"
    controller.overrides(FailurePolicy.make_decision, why, "self", "training_failed_error")
    controller.overrides(FailurePolicy.__init__, why, "self", "failure_config")
    controller.has(FailureDecision, why, "RETRY", "RAISE")
    controller.calls(_is_preempted_actor, why, RayActorError())
    controller.calls(ControllerError, why, Exception())
    controller.has(ControllerError, why, "controller_failure")
    controller.has(WorkerGroupError, why, "worker_failures")
    controller.has(exceptions.WorkerHealthCheckFailedError, why, "health_check_failure")
    controller.has(exceptions, why, "WorkerHealthCheckTimeoutError", "WorkerGroupStartupTimeoutError")
    controller.calls(exceptions.WorkerGroupStartupTimeoutError, why, num_workers=2)
    controller.has(exceptions, why, "WorkerGroupStartupFailedError")


def test_the_callbacks_of_a_run() -> None:
    controller = Dependent("cluster/controller.py")
    why = "it leaves out what waits for the process groups of dead peers, and asks nobody for room"
    controller.calls(callbacks.AcceleratorSetupCallback, why, None, None)
    controller.calls(callbacks.BackendSetupCallback, why, None)
    hook = callbacks.BackendSetupCallback.before_execution_group_shutdown
    controller.overrides(hook, why, "self", "execution_group")
    controller.overrides(FixedScalingPolicy.after_controller_start, why, "self", "train_run_context")
    controller.overrides(FixedScalingPolicy._maybe_send_resource_request, why, "self")
    hook = WorkerCallback.after_init_train_context
    Dependent("cluster/ray_worker.py").overrides(hook, "workers answer SIGTERM from there on", "self")
    Dependent("cluster/controller_status.py").calls(
        GlobalState.get_draining_nodes, "runs leave nodes that are taken away", ...
    )


def test_the_group_of_workers() -> None:
    group = Dependent("cluster/worker_group.py")
    why = "it starts the workers in processes that stand already"
    group.overrides(WorkerGroup._start_impl, why, "self", "worker_group_state_builder")
    group.replaces(WorkerGroup._start_impl, why, "1f4c2b9acf4c")
    init = WorkerGroup._init_train_context_on_workers
    group.overrides(init, why, "self", "workers", "sync_actor", "train_context_args")
    group.replaces(init, why, "ef1e7879cd7c")
    group.calls(WorkerGroup._init_train_context, why, ..., [], None)
    group.calls(WorkerGroup._create_placement_group, why, ..., None, None)
    group.calls(WorkerGroup._create_workers, why, ..., 2, None, {})
    group.calls(WorkerGroup._clear_state, why, ...)
    group.calls(WorkerGroup.has_started, why, ...)
    group.overrides(WorkerGroup._get_worker_runtime_env, why, "custom_runtime_env")
    attributes = ("_train_run_context", "_worker_group_context", "_callbacks", "_worker_group_start_timeout_s")
    group.has(WorkerGroup, why, *attributes, "_worker_group_state", "_worker_rank_to_replica_group_rank")
    group.has(WorkerGroup, why, "_storage_context", "_worker_callbacks_to_propagate")
    group.holds(
        {"num_workers", "resources_per_worker", "train_fn_ref"} <= fields(WorkerGroupContext), why, "its context"
    )
    group.holds({"actor", "metadata", "distributed_context"} <= fields(Worker), why, "what it knows of a worker")
    for hook in ("before_worker_group_start", "after_worker_group_start", "after_worker_group_training_start"):
        group.calls(getattr(WorkerGroupCallback, hook), why, ..., None)
    names = ("train_run_context", "distributed_context", "synchronization_actor", "storage_context")
    group.calls(
        RayTrainWorker.init_train_context, why, ..., **dict.fromkeys((*names, "worker_callbacks", "controller_actor"))
    )
    group.calls(RayTrainWorker.run_train_fn, why, ..., None)
    group.holds(issubclass(RayTaskError, Exception) and issubclass(RayActorError, Exception), why, "its exceptions")


def test_the_workers_of_an_elastic_run() -> None:
    seats, group = Dependent("cluster/seats.py"), Dependent("cluster/worker_group.py")
    why = "each worker has a place of its own, on a node that is chosen here"
    seats.calls(placement_group, why, [{}], bundle_label_selector=[{}])
    seats.calls(remove_placement_group, why, None)
    seats.calls(state.available_resources_per_node, why)
    seats.calls(GlobalState.get_draining_nodes, why, ...)
    seats.holds(ray._raylet.RAY_NODE_ID_KEY == NODE_ID, why, "the label of a node's id")
    seats.calls(placement_group_table, why, None)
    seats.mentions(GlobalState._gen_placement_group_info, why, '"bundles_to_node_id"')
    why = "it counts what the trials of a sweep have"
    accessor = GlobalState._connect_and_get_accessor
    seats.calls(accessor, why, ...)
    seats.mentions(
        GlobalState.placement_group_table, why, "get_placement_group_table()", "PlacementGroupTableData.From"
    )
    table = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]
    names = {"creator_job_id", "state", "bundles"} <= set(table.DESCRIPTOR.fields_by_name)
    seats.holds(names and "REMOVED" in table.DESCRIPTOR.enum_values_by_name, why, "its table of placement groups")
    names = {"node_id", "unit_resources"} <= set(table.DESCRIPTOR.fields_by_name["bundles"].message_type.fields_by_name)
    seats.holds(names, why, "what it tells of a bundle")
    why = "each worker has a place of its own"
    group.overrides(WorkerGroup._create_placement_group, why, "self", "scaling_config", "worker_group_context")
    group.replaces(WorkerGroup._create_workers, why, "394f20be2cc3")
    group.calls(WorkerGroup._assign_worker_ranks, why, [])
    group.calls(Worker, why, None, None, {}, placement_group_bundle_index=0)
    group.calls(bundle_to_remote_args, why, {})
    group.calls(WorkerGroup.shutdown, why, ...)
    group.has(WorkerGroup, why, "_worker_cls")
    why = "a process that has trained trains again: it gets another context, with a thread of its own"
    worker = Dependent("cluster/ray_worker.py")
    worker.mentions(
        RayTrainWorker.init_train_context, why, "training_thread_runner=ThreadRunner()", "set_train_context("
    )
    worker.calls(get_train_context, why)
    worker.calls(ThreadRunner.is_running, why, ...)
    worker.calls(ThreadRunner.get_error, why, ...)
    why = "it decides how many workers there are"
    controller = Dependent("cluster/controller.py")
    controller.overrides(FixedScalingPolicy.make_decision_for_non_running_worker_group, why, "self")
    controller.calls(ResizeDecision, why, num_workers=2, resources_per_worker={})
    controller.mentions(
        TrainController._make_and_handle_scaling_decision_for_non_running_worker_group, why, "NoopDecision"
    )


def test_the_end_of_a_group_of_workers() -> None:
    group = Dependent("cluster/worker_group.py")
    why = "it ends workers without an actor beside them"
    names = ("start_time", "placement_group_handle", "workers", "sync_actor")
    group.holds(tuple(field.name for field in dataclasses.fields(WorkerGroupState)) == names, why, "the state's fields")
    group.replaces(WorkerGroupState.shutdown, why, "74f2efbaa4f4")
    group.calls(PlacementGroupHandle.wait, why, ..., 1)
    group.calls(PlacementGroupHandle.shutdown, why, ...)
    group.has(PlacementGroupHandle, why, "placement_group")


def test_where_ranks_meet_to_report() -> None:
    group = Dependent("cluster/worker_group.py")
    why = "no actor stands where ranks meet: what they ask of it is answered in their own process"
    from ray.train.collective import collectives
    from ray.train.v2._internal.execution import collective_impl, context

    group.mentions(collective_impl, why, "sync_actor.broadcast_from_rank_zero.remote(", "caller_method_name=")
    group.mentions(context, why, 'caller_method_name="ray.train.report"')
    group.has(TrainContext, why, "get_synchronization_actor")
    group.has(collectives, why, "barrier", "broadcast_from_rank_zero")


def test_how_the_workers_of_one_machine_find_each_other() -> None:
    rendezvous = Dependent("cluster/rendezvous.py")
    why = "workers meet by a file, not by a server that all can reach"
    rendezvous.overrides(torch_config._TorchBackend.on_start, why, "self", "worker_group", "backend_config")
    rendezvous.replaces(torch_config._TorchBackend.on_start, why, "2d82fd3c0531")
    rendezvous.calls(torch_config._set_torch_distributed_env_vars, why)
    names = ("backend", "world_rank", "world_size", "init_method", "timeout_s")
    rendezvous.calls(torch_config._setup_torch_process_group, why, **dict.fromkeys(names))
    rendezvous.has(torch_config.TorchConfig(), why, "backend_cls", "backend", "timeout_s")
    rendezvous.calls(WorkerGroup.execute, why, ..., print, "argument")
    rendezvous.calls(WorkerGroup.execute_single_async, why, ..., 0, print, world_rank=0)


def test_the_constants_of_train() -> None:
    cluster = Dependent("cluster/cluster.py")
    why = "it sets them in the environment, by these names"
    cluster.holds(constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR in RAY_SETTINGS, why, "the time between two polls")
    cluster.holds(constants.METRICS_ENABLED_ENV_VAR in RAY_SETTINGS, why, "metrics")


def test_what_worker_processes_import_as_they_start() -> None:
    module = "ray.train.v2._internal.execution.worker_group.worker"
    holds = RayTrainWorker.__module__ == module
    Dependent("cluster/prestart.py").holds(holds, "it is imported ahead", f"workers are of {RayTrainWorker.__module__}")


def test_private_parts_are_used_by_the_modules_that_are_named_in_these_tests_alone() -> None:
    package = Path(raytrain.__file__).parent
    private = re.compile(
        r"\b(ray\._private|ray\.[\w.]*_internal|ray\._raylet|internal_kv|ray\.tune\.execution|_tune_controller)\b"
    )
    users = {str(path.relative_to(package)) for path in package.rglob("*.py") if private.search(path.read_text())}
    contracts = [Path(__file__), Path(__file__).parents[1] / "sweep" / Path(__file__).name]
    named = {module for path in contracts for module in re.findall(r'Dependent\("(.*?)"\)', path.read_text())}
    assert users <= named, f"say in a test here what {sorted(users - named)} rely on"


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
