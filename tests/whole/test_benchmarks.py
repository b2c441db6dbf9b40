"""The benchmarks run, and see when loops did different work. What they measure is nobody's promise here."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch):
    """They lie beside the package, in no environment's path."""
    monkeypatch.syspath_prepend(str(ROOT))


def run_module(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_loop_compares_loops_that_did_the_same_work(tmp_path):
    out = tmp_path / "out.json"
    words = ["--only", "raytrain-here", "--workload", "overhead", "--steps", "6", "--rounds", "1", "--json", str(out)]
    done = run_module("benchmarks.loop", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    (workload,) = report["loop"]
    assert set(workload["loops"]) == {"plain", "raytrain-here"}
    for loop in workload["loops"].values():
        assert len(loop["steps_per_s"]) == len(loop["ratio"]) == 1
        assert loop["weights_difference"] <= workload["tolerance"]
        assert all(len(digest) == 64 for digest in loop["sha256"])
        assert f"| {loop['name']}" in done.stdout
    assert {"date", "cpu", "cores", "python", "torch", "ray", "raytrain"} <= set(report["machine"])


def test_both_conv_loops_end_with_the_same_weights(tmp_path):
    from benchmarks import contenders, handwritten
    from benchmarks.loop import TOLERANCE, difference
    from benchmarks.pieces import CONV, Assignment, Span
    from raytrain import train
    from raytrain.config.sections import Config

    assignment = Assignment(CONV, Span(1, 1), tmp_path)
    threads = torch.get_num_threads()
    try:
        handwritten.train(assignment, distributed=False)
    finally:
        torch.set_num_threads(threads)
    loss, weights = contenders.kept(tmp_path)
    train(Config.model_validate(contenders.config_of(assignment, ranks=1)), num_workers=0, quiet=True)
    our_loss, our_weights = contenders.in_run_folder(tmp_path)
    assert our_loss == pytest.approx(loss, rel=TOLERANCE["conv"])
    assert difference(our_weights, weights) <= TOLERANCE["conv"]


def test_other_weights_than_the_hand_written_loops_are_a_failure():
    from benchmarks.contenders import HAND_PLAIN, RAYTRAIN_HERE, Ended
    from benchmarks.loop import failures, shown, summary

    def ended(value: float) -> Ended:
        watch = {"steps": 10, "seconds": 2.0, "ranks": 1, "stamps": {}}
        return Ended(0.0, 9.0, watch, loss=0.5, weights={"weight": torch.tensor([1.0, value])})

    def report(value: float) -> dict:
        loops = {
            "plain": summary(HAND_PLAIN, [ended(0.5)], [ended(0.5)]),
            "raytrain-here": summary(RAYTRAIN_HERE, [ended(value)], [ended(0.5)]),
        }
        return {"workload": "overhead", "warmup": 1, "steps": 10, "tolerance": 1e-5, "failed": [], "loops": loops}

    assert failures(report(0.5)) == []
    assert failures(report(0.5 + 1e-6)) == []
    assert "bit equal" in shown(report(0.5))
    for value in (0.51, float("nan")):
        (line,) = failures(report(value))
        assert line.startswith("overhead: raytrain, --num_workers 0: weights differ by")


def test_ways_of_saving_are_compared_on_training_that_ends_with_the_same_weights(tmp_path):
    out = tmp_path / "out.json"
    words = ["--only", "raytrain", "--light", "--saves", "1", "--rounds", "1", "--json", str(out)]
    done = run_module("benchmarks.checkpoint", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    ways = json.loads(out.read_text())["checkpoint"]["ways"]
    assert set(ways) == {"none", "torch-save", "raytrain-none", "raytrain"}
    assert ways["torch-save"]["saved"] == [3]
    assert ways["raytrain"]["saved"][0] in (1, 2, 3)  # on a busy machine a newer one takes the place of one that waits
    for key in ("torch-save", "raytrain"):
        assert len(ways[key]["x_torch_save"]) == len(ways[key]["x_no_saves"]) == 1
        assert f"| {ways[key]['name']}" in done.stdout


def test_feed_reads_every_sample_of_both_loaders():
    from benchmarks import feed

    report = feed.measure(rounds=1, share=0.01, loader_workers=(0,))
    assert [(case["samples"], case["loader_workers"]) for case in report] == [("cheap", 0), ("costly", 0)]
    lines = feed.shown(report).splitlines()
    assert len(lines) == 2 + 2 + len(report)
    assert len({len(line) for line in lines[2:]}) == 1
    json.dumps(report)


def test_rounds_begin_with_another_loop_each():
    from benchmarks.measure import interleaved

    order = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 4, say=lambda text: None)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_loop_that_fails_is_left_out_and_the_rounds_go_on():
    from benchmarks.measure import BenchmarkError, interleaved

    def fails() -> int:
        raise BenchmarkError("no such luck")

    told = []
    assert interleaved({"good": lambda: 1, "bad": fails}, 2, told.append, needed=["good"]) == {"good": [1, 1]}
    assert "FAILED: bad is left out: no such luck" in told
    with pytest.raises(BenchmarkError):
        interleaved({"bad": fails}, 2, told.append, needed=["bad"])


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for whoever inherits it to take its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_past_its_time_is_ended_with_all_that_it_started(tmp_path):
    from benchmarks.measure import BenchmarkError, run_command

    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(BenchmarkError, match="was not done after 2 s"):
        run_command([sys.executable, "-c", script], tmp_path, timeout_s=2.0)
    child = int((tmp_path / "printed.txt").read_text())
    deadline = time.monotonic() + 10.0
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_that_fails_is_told_with_what_it_printed(tmp_path):
    from benchmarks.measure import BenchmarkError, run_command

    with pytest.raises(BenchmarkError, match="ended with status 3; the end of what it printed:\nno such luck"):
        run_command([sys.executable, "-c", "print('no such luck'); raise SystemExit(3)"], tmp_path, timeout_s=30.0)


def test_a_sweep_is_timed_to_its_first_step_and_to_its_end():
    from benchmarks import sweep
    from benchmarks.measure import scratch

    with scratch() as folder:  # tmp_path is too long for the sockets of Ray's own cluster
        found = sweep.by_raytrain(folder, epochs=1, per_axis=1)
        assert 0 < found["start_s"] < found["whole_s"]
        assert sweep.bare(folder, epochs=1, per_axis=1)["whole_s"] > 0


def test_a_search_tells_when_it_got_to_the_target(tmp_path):
    from benchmarks import sweep

    found = sweep.searched(tmp_path, "asha", seed=0, budget={"EPOCHS": 2}, target=0.01)
    assert 0 < found["to_target_s"] < found["whole_s"]
    assert (found["to_target_epochs"], found["epochs"] >= 2) == (1, True)
    report = {"target": 0.01, "budgets": {"epochs": 2}, "seeds": 1, "found": {"asha, epochs": [found]}}
    assert "| ASHA, 2 epochs | 1 of 1 " in sweep.shown_asha(report)


def test_a_recovery_is_to_the_first_step_that_no_worker_had_begun():
    from benchmarks.recovery import Begun, recovery

    before = [Begun(at=10.0 + step, step=step, pid=pid) for step in range(8) for pid in (1, 2)]
    late = [Begun(at=18.0, step=8, pid=1)]  # by a worker that was not killed, and that Ray ends
    after = [Begun(at=20.0 + step, step=step, pid=pid) for step in range(5, 10) for pid in (3, 4)]
    found = recovery({1, 2}, 17.5, [*before, *late, *after])
    assert (found.new_step_s, found.restart_s, found.repeated) == (11.5, 7.5, 3)


def test_exactness_is_measured_against_the_plain_order(tmp_path):
    out = tmp_path / "out.json"
    done = run_module("benchmarks.exact", "--workload", "overhead", "--rounds", "1", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["speed"]
    assert [row["setting"] for row in rows] == ["V 2 on W 2", "V 4 on W 1", "V 4 on W 2, by gloo"]
    for row in rows:
        assert row["ratio"] == [pytest.approx(row["exact"][0] / row["plain"][0])]
        assert f"| {row['setting']}" in done.stdout


def test_the_simulated_network_takes_what_one_reckons():
    from benchmarks.wire import Network, exchange, ring

    network = Network("plain", latency_s=1.0, bandwidth=8.0, overhead_s=0.0)
    assert ring(4, 32, network).seconds == pytest.approx(6 * (1.0 + 1.0))  # six messages of 8 bytes, one by one
    assert exchange(4, 32, network, 4).seconds == pytest.approx(1.0 + 3 * 1.0 + 3 * 2.0)  # three at once, then a ring
    for workers, virtual_workers, sent in ((4, 4, 48), (4, 8, 48), (4, 12, 72)):  # with 12 each has two nodes
        assert exchange(workers, 32, network, virtual_workers).sent == sent
    assert ring(4, 32, network).sent == 48


def test_what_is_for_a_gpu_runs_on_a_cpu_too_and_names_what_it_had_no_time_for(tmp_path):
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--quick", "--no-tests", "--json", str(out)]
    done = run_module("benchmarks.gpu", *words, "--only", "waits", "recovery")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert [row["waits_per_step"] for row in report["waits"]] == [0.0, 0.0]
    [row] = report["recovery"]
    assert row["seconds"] > 0 and 0 <= row["steps_again"] <= 12
    assert "from SIGKILL to the next new step" in done.stdout
    done = run_module("benchmarks.gpu", *words, "--only", "saves", "--minutes", "0")
    assert done.stdout.endswith("no time was left for saves: of the large net\n")


def test_the_watch_counts_who_waits_for_the_gpu_and_in_which_line(monkeypatch):
    from benchmarks import pieces

    monkeypatch.setattr(pieces, "set_sync_debug_mode", lambda mode: None)
    with warnings.catch_warnings():
        found = pieces.count_waits()
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    [(line, count)] = found.items()
    assert line.startswith("test_benchmarks.py:") and count == 2
