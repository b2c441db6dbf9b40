"""The command line: parse, call, print. Nothing heavy is imported before it is known to be needed."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from raytrain import __version__, hash_seed, launcher
from raytrain.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    RaytrainError,
    StorageError,
    masked,
)
from raytrain.proof.ways import KINDS

# Flags that set a config key: name -> (what its value is, key, help). The schema checks the value.
CONFIG_FLAGS: dict[str, tuple[str, str, str]] = {
    "--task": ("NAME", "TASK", "what trains: openpcdet, pointpillars, or pkg.module:Class"),
    "--epochs": ("N", "OPTIMIZATION.NUM_EPOCHS", "epochs to train, also the length of the schedule"),
    "--workers": ("N", "LOADER.WORKERS", "loader processes of each worker"),
    "--extra_tag": ("NAME", "EXTRA_TAG", "last part of the run folder"),
    "--ckpt_save_interval": ("N", "CHECKPOINT.EVERY_EPOCHS", "epochs between checkpoints"),
    "--max_ckpt_save_num": ("N", "CHECKPOINT.KEEP_LAST", "checkpoints to keep"),
    "--ckpt_save_time_interval": ("SECONDS", "CHECKPOINT.EVERY_SECONDS", "seconds between checkpoints within an epoch"),
    "--num_epochs_to_eval": ("N", "EVAL.LAST_EPOCHS", "epochs before the last to evaluate too"),
    "--logger_iter_interval": ("N", "LOG.LINE_EVERY", "steps between log lines"),
    "--num_workers": ("N", "SCALE.NUM_WORKERS", "worker processes; 2-8: as there is room; 0: this one, without Ray"),
    "--output": ("PATH", "OUTPUT", "root of the run folders: a folder, or a URI such as s3://bucket/path"),
    "--seed": ("N", "SEED", "seed of all that is random"),
}
TUNE_FLAGS: dict[str, tuple[str, str, str]] = {
    "--num_samples": ("N", "TUNE.NUM_SAMPLES", "trials"),
    "--scheduler": ("NAME", "TUNE.SCHEDULER", "what stops trials: none, asha, hyperband, median, pbt, pb2"),
    "--search": ("NAME", "TUNE.SEARCH", "what chooses trials: random, grid, tpe, gp"),
    "--metric": ("NAME", "TUNE.METRIC", "what trials are compared by"),
    "--mode": ("max|min", "TUNE.MODE", "whether more of it is better"),
    "--concurrent": ("N", "TUNE.CONCURRENT", "trials at a time"),
}
SWITCHES: dict[str, tuple[str, str, str]] = {
    "--sync_bn": ("OPTIMIZATION.SYNC_BN", "true", "BatchNorm over the samples of all workers"),
    "--use_amp": ("OPTIMIZATION.USE_AMP", "true", "mixed precision (OPTIMIZATION.AMP_DTYPE: fp16 or bf16)"),
    "--use_gpu": ("SCALE.USE_GPU", "true", "one GPU for each worker"),
    "--no_gpu": ("SCALE.USE_GPU", "false", "train on the CPU"),
}
LOOK_S = 3.0  # so long a disk may take to answer before anything starts
WITH_A_TASK = ("train", "tune", "eval", "view", "prove")  # commands that run the user's code
LISTING_COLUMNS = 240  # of a table that goes to a file or a pipe: one line a checkpoint
# Flags of the heritage that have nothing left to do: name -> (takes a value, what is so instead).
LAUNCHERS_FLAGS: dict[str, tuple[bool, str]] = {
    "--local_rank": (True, "Ray gives each worker its rank"),
    "--local-rank": (True, "Ray gives each worker its rank"),
}
IGNORED_FLAGS: dict[str, tuple[bool, str]] = {
    **LAUNCHERS_FLAGS,
    "--fix_random_seed": (False, "every run is seeded (--seed)"),
    "--merge_all_iters_to_one_epoch": (False, "loader workers live all run and read ahead across epochs anyway"),
    "--max_waiting_mins": (True, "evaluation runs inside training (EVAL.EVERY) and waits for nothing"),
    "--start_epoch": (True, "the checkpoint says where to go on"),
    "--save_to_file": (False, "`raytrain eval --save_to_file` writes predictions"),
    "--use_tqdm_to_record": (False, "the live line is always there"),
    "--wo_gpu_stat": (False, "no gpustat is called"),
}
IGNORED_EVAL_FLAGS: dict[str, tuple[bool, str]] = {
    **LAUNCHERS_FLAGS,
    "--max_waiting_mins": (True, "nothing is waited for"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 finished, 1 failed, 2 bad usage or config, 75 stopped and saved."""
    # Or a thread of Ray's that outlives its cluster (a second Ctrl-C) would start another. Read as Ray is imported.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if argv is None and runs_a_task(sys.argv[1:]) and hash_seed.may_begin_again():
        hash_seed.begin_again()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a program has put one of its own in its place
            stream.reconfigure(errors="backslashreplace")  # a name or a bar that it cannot encode ends no run
    try:
        args = parsed(argv)
        return int(args.run(args))
    except RaytrainError as error:
        if error.was_shown:
            return error.exit_status
        if prints_messages():
            print(f"raytrain: {error}", file=sys.stderr)
        elif error.exit_status == EXIT_USAGE:
            wait_for_rank_0()
        return error.exit_status
    except KeyboardInterrupt:
        print("raytrain: stopped at once; the run folder's newest checkpoint is where it goes on", file=sys.stderr)
        return EXIT_FAILED


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is wrong with it ends the process."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].replace("-", "_").strip("_"), vars(args), n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        parser.prog = f"raytrain {args.command}"
        parser.error(f"{unknown[0]} is unknown{hint}")
    try:
        Path.cwd()
    except FileNotFoundError:
        parser.error("the current folder has been removed; go to one that exists (cd)")
    return args


def runs_a_task(words: Sequence[str]) -> bool:
    """Whether a command line has the user's code run; a look, before anything is parsed."""
    return bool(words) and words[0] in WITH_A_TASK and not {"-h", "--help"} & set(words)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without all the flags there are."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").rstrip(".")
        text = f"raytrain: {message}{'' if message.endswith('?') else '.'} See {self.prog} --help\n"
        if not prints_messages():
            wait_for_rank_0()
        self.exit(EXIT_USAGE, text if prints_messages() else None)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:  # what --help and --version print
            say(message.rstrip("\n"))
        else:
            super()._print_message(message, file)


def prints_messages() -> bool:
    """Whether this process tells of the run: of those that torchrun or Slurm has started one does."""
    world = launcher.world_here()
    return world is None or world[0] == 0


def wait_for_rank_0() -> None:
    """Wait to be ended: torchrun ends all processes once one has, and only rank 0 says what all of them find wrong.

    Slurm ends none of them, which then end by themselves.
    """
    time.sleep(10)


def build_parser() -> Parser:
    parser = Parser(prog="raytrain", description="Train PyTorch models on Ray from one YAML file.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"raytrain {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    add_train(commands)
    add_tune(commands)
    add_eval(commands)
    add_simulate(commands)
    add_view(commands)
    add_prove(commands)
    add_checkpoints(commands)
    add_show_config(commands)
    return parser


def add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train, or go on training", allow_abbrev=False)
    add_config_arguments(train)
    train.add_argument("--batch_size", type=count, metavar="N", help="samples of a step over all virtual workers")
    add_address_argument(train)
    train.add_argument("--dashboard", action="store_true", help="serve Ray's dashboard while it trains (starts slower)")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest verified checkpoint of the run folder (auto), from none, or from this one",
    )
    train.add_argument("--ckpt", metavar="PATH", help="as --resume PATH")
    train.add_argument("--overwrite", action="store_true", help="with --resume never: a run in the folder gives way")
    train.add_argument("--pretrained_model", metavar="PATH", help="weights to begin with, where names and shapes fit")
    add_partial_argument(train)
    train.add_argument(
        "--allow-config-change",
        "--allow_config_change",
        action="store_true",
        help="resume under a batch size, seed ... that was not the run's",
    )
    add_launcher_arguments(train)
    add_ignored_arguments(train, IGNORED_FLAGS)
    add_set_argument(train)
    train.set_defaults(run=run_train)


def add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="sweep what the config's TUNE says, or go on with it",
        description="Trains a trial for each sample of TUNE.SPACE, compares them by TUNE.METRIC, and writes sweep.csv, "
        "sweep.html and best.yaml. The same command goes on with a sweep that was stopped or killed.",
        allow_abbrev=False,
    )
    add_config_arguments(tune)
    for flag, (kind, key, text) in TUNE_FLAGS.items():
        tune.add_argument(flag, metavar=kind, help=f"{text} ({key})")
    tune.add_argument("--extend", type=count, default=0, metavar="N", help="this many samples more (TUNE.NUM_SAMPLES)")
    add_address_argument(tune)
    add_set_argument(tune)
    tune.set_defaults(run=run_tune)


def add_eval(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="evaluate a checkpoint", allow_abbrev=False)
    add_config_arguments(evaluate)
    evaluate.add_argument("--ckpt", metavar="PATH", help="the checkpoint; else the run's best one, else its newest")
    evaluate.add_argument(
        "--ckpt_dir", metavar="DIR", help="a folder of checkpoints: its newest, or with --eval_all all"
    )
    evaluate.add_argument(
        "--eval_all", action="store_true", help="all checkpoints, one after another, the oldest first"
    )
    evaluate.add_argument(
        "--start_epoch", type=functools.partial(count, least=0), metavar="N", help="with --eval_all: from this epoch on"
    )
    evaluate.add_argument(
        "--pretrained_model", metavar="PATH", help="weights from any file, over those of --ckpt where both are given"
    )
    add_partial_argument(evaluate)
    evaluate.add_argument("--batch_size", type=count, metavar="N", help="samples at a time")
    evaluate.add_argument("--eval_tag", default="default", help="last part of the folder for the results")
    evaluate.add_argument("--save_to_file", action="store_true", help="write the predictions too, as predictions.pt")
    evaluate.add_argument("--infer_time", action="store_true", help="say how long predicting takes, too")
    add_launcher_arguments(evaluate)
    add_ignored_arguments(evaluate, IGNORED_EVAL_FLAGS)
    add_set_argument(evaluate)
    evaluate.set_defaults(run=run_eval)


def add_simulate(commands: Any) -> None:
    simulate = commands.add_parser(
        "simulate", help="write simulated LiDAR scenes as KITTI has them", allow_abbrev=False
    )
    simulate.add_argument("out", metavar="OUT", help="the folder to write: ImageSets and training")
    simulate.add_argument("--scenes", type=count, metavar="N", help="scenes of each split (SIMULATION.NUM_SCENES)")
    simulate.add_argument("--split", choices=("train", "val", "both"), default="both", help="which scenes (both)")
    simulate.add_argument(
        "--seed",
        type=functools.partial(count, least=0),
        metavar="N",
        help="seed of the scenes; else the config's, else 0",
    )
    simulate.add_argument("--cfg_file", metavar="YAML", help="a config, for its DATA_CONFIG.SIMULATION")
    add_set_argument(simulate, "config keys, dotted; without --cfg_file those of SIMULATION: --set BEAMS 32")
    simulate.set_defaults(run=run_simulate)


def add_view(commands: Any) -> None:
    view = commands.add_parser(
        "view", help="draw validation samples, with what a checkpoint predicts", allow_abbrev=False
    )
    add_config_arguments(view)
    view.add_argument("--ckpt", metavar="PATH", help="the checkpoint; else the run's best one, its newest, or none")
    view.add_argument("--count", type=count, metavar="N", help="how many pictures (EVAL.PICTURES)")
    add_set_argument(view)
    view.set_defaults(run=run_view)


def add_prove(commands: Any) -> None:
    prove = commands.add_parser(
        "prove",
        help="try whether your task trains to the same bits however it is run",
        description="Takes a few steps straight, once more, killed half-way and resumed, with other loader workers, on "
        "other numbers of worker processes, and under another hash seed; says whether all agree, else what is first "
        "not the same, and what to write instead. The run's own folder is not touched. Exit status: 0 if all agree, 1 "
        "if not, 2 for a config that cannot train.",
        allow_abbrev=False,
    )
    add_config_arguments(prove)
    prove.add_argument("--steps", type=count, default=30, metavar="N", help="steps to take in each way (30)")
    prove.add_argument(
        "--only", choices=KINDS, nargs="+", default=[], metavar="WAY", help=f"try only {', '.join(KINDS)}"
    )
    prove.add_argument(
        "--timeout",
        type=count,
        metavar="S",
        help="seconds that a way may take before it counts as hung (20 times as long as straight, and 60 at least)",
    )
    add_set_argument(prove)
    prove.set_defaults(run=run_prove)


def add_checkpoints(commands: Any) -> None:
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list a run's checkpoints, and say what a resume would take and why; or compare two runs or checkpoints",
        description="Lists the checkpoints of a run, and says what a resume would take and why. Nothing is written; "
        "the run may be training. Exit status: 0; 1 if nothing in it can be trusted, with --verify also if any "
        "checkpoint is damaged; 2 if this is no run folder. With two runs or checkpoints (A B): says whether they are "
        "the same bits, else which tensors differ, from which step on and by how much. Exit status: 0 if they are the "
        "same; 1 if not; 2 if that cannot be told. `export RUN --to FOLDER` writes a checkpoint as OpenPCDet loads it, "
        "`import FILE.pth --cfg_file YAML` puts one of its into the run folder of that config.",
        allow_abbrev=False,
    )
    checkpoints.add_argument(
        "run_dir", nargs="?", metavar="RUN", help="the run folder, a path or URI; or give --cfg_file"
    )
    checkpoints.add_argument(
        "other", nargs="?", metavar="B", help="compare RUN with this; each a run folder, YAML, checkpoint or .pth"
    )
    checkpoints.add_argument("--to", metavar="FOLDER", help="with export: where the .pth and the YAML go (.)")
    checkpoints.add_argument(
        "--verify", action="store_true", help="read every byte of every checkpoint, not of one only"
    )
    add_config_arguments(checkpoints, required=False)
    add_set_argument(checkpoints)
    checkpoints.set_defaults(run=run_checkpoints)


def add_show_config(commands: Any) -> None:
    show = commands.add_parser("show-config", help="print the resolved config", allow_abbrev=False)
    show.add_argument("--reference", action="store_true", help="print every key there is, with default and meaning")
    add_config_arguments(show, required=False)
    add_set_argument(show)
    show.set_defaults(run=run_show_config)


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--cfg_file", required=required, metavar="YAML", help="the config of the run")
    for flag, (kind, key, text) in CONFIG_FLAGS.items():
        parser.add_argument(flag, metavar=kind, help=f"{text} ({key})")
    for flag, (key, _, text) in SWITCHES.items():
        parser.add_argument(flag, action="store_true", help=f"{text} ({key})")


def add_address_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="join this Ray cluster; auto: the one on this machine; local: none, also where RAY_ADDRESS names one",
    )


def add_partial_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-partial",
        "--allow_partial",
        action="store_true",
        help="with --pretrained_model: take what fits of a file of which less than half does",
    )


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm"),
        help="slurm: the tasks that srun starts are the workers of one run; Ray or torchrun need no word",
    )
    parser.add_argument("--tcp_port", type=count, metavar="N", help="with --launcher slurm: where the tasks meet")


def take_launcher(args: argparse.Namespace) -> None:
    """What --launcher says, done; or a line on what is so instead."""
    if args.launcher == "slurm":
        launcher.join_slurm(os.environ, args.tcp_port and str(args.tcp_port))
    elif prints_messages():
        is_so = args.launcher == "pytorch" and launcher.name_here() is not None
        if args.launcher is not None and not is_so:
            note = "Ray places the workers (--num_workers, --address)"
            print(f"note: --launcher {args.launcher} has no effect here: {note}", file=sys.stderr)
        if args.tcp_port is not None:
            print("note: --tcp_port has no effect here: Ray finds the ports", file=sys.stderr)


def add_ignored_arguments(parser: argparse.ArgumentParser, flags: dict[str, tuple[bool, str]]) -> None:
    for flag, (takes_value, reason) in flags.items():
        parser.add_argument(
            flag, nargs="?" if takes_value else 0, action=_IgnoredFlag, help=argparse.SUPPRESS, const=reason
        )


ANY_KEY = "any config keys, dotted: --set OPTIMIZATION.LR 1e-3 MODEL.WIDTH 32"


def add_set_argument(parser: argparse.ArgumentParser, what: str = ANY_KEY) -> None:
    parser.add_argument(
        "--set",
        dest="set_words",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help=f"{what} (must come last)",
    )


def count(word: str, least: int = 1) -> int:
    """The type of a flag that counts something."""
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number >= {least}")
    return int(word)


class _IgnoredFlag(argparse.Action):
    """A flag that is accepted for the sake of old command lines, with a line on what is so instead."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if prints_messages():
            print(f"note: {option_string} has no effect here: {self.const}", file=sys.stderr)


def load(args: argparse.Namespace) -> Any:
    """The config of a command line: the file, the flags, --set."""
    from raytrain.config.heritage import TASKS
    from raytrain.config.load import load_config
    from raytrain.config.overrides import workers_words

    if args.use_gpu and args.no_gpu:
        raise ConfigError("--use_gpu and --no_gpu are both given; give one of them")
    given = vars(args)
    known = {**CONFIG_FLAGS, **TUNE_FLAGS}
    words = {flag: [key, given[flag[2:]]] for flag, (_, key, _) in known.items() if given.get(flag[2:]) is not None}
    if "--num_workers" in words:
        words["--num_workers"] = workers_words(args.num_workers)
    if "--task" in words:
        words["--task"] = ["TASK", TASKS.get(args.task, args.task)]
    flags = [(flag, *each[i : i + 2]) for flag, each in words.items() for i in range(0, len(each), 2)]
    flags += [(flag, key, word) for flag, (key, word, _) in SWITCHES.items() if given[flag[2:]]]
    return load_config(args.cfg_file, args.set_words, flags)


def run_train(args: argparse.Namespace) -> int:
    take_launcher(args)
    cfg = load(args)
    if args.ckpt is not None and args.resume != "auto":
        raise ConfigError("--ckpt and --resume both say where to go on; give one of them")
    options = {
        "address": args.address,
        "resume": args.ckpt or args.resume,
        "overwrite": args.overwrite,
        "allow_config_change": args.allow_config_change,
        "pretrained_model": args.pretrained_model,
        "allow_partial": args.allow_partial,
        "batch_size": args.batch_size,
        "dashboard": args.dashboard,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("run", "command")},
    }
    result = train_as_one_of_several(cfg, args, options) if launcher.name_here() else train_as_asked(cfg, options)
    if result.status == "complete" and prints_messages():
        for line in result.lines():
            say(line)
    return EXIT_STOPPED if result.status == "stopped" else EXIT_FINISHED


def train_as_asked(cfg: Any, options: dict[str, Any]) -> Any:
    """The run on Ray, or in this process; how it ended. A cluster for it starts while torch is imported."""
    from raytrain.training.signals import signals_wish_stop

    check_output(cfg)
    with contextlib.ExitStack() as stack:
        stop, starting_cluster = stack.enter_context(signals_wish_stop()), None
        if cfg.SCALE.NUM_WORKERS != 0 and options["address"] in (None, "local") and not seems_complete(cfg, options):
            from raytrain.cluster.cluster import starting

            address, dashboard = options["address"], options["dashboard"]
            starting_cluster = stack.enter_context(starting(address, dashboard=dashboard, scale=cfg.SCALE))
        from raytrain.launch import launch
        from raytrain.training.preflight import LaunchOptions

        return launch(cfg, LaunchOptions(**options), stop=stop, starting_cluster=starting_cluster)


def check_output(cfg: Any) -> None:
    """A ConfigError or StorageError where OUTPUT cannot be: before anything starts that takes seconds.

    A bucket is asked later: that takes its time too, and Ray starts meanwhile.
    """
    from raytrain.journal.run_folder import check_writable, run_dir_of
    from raytrain.storage.storage import open_storage

    run_dir = run_dir_of(cfg)
    if "://" not in run_dir:
        check_writable(open_storage(run_dir, LOOK_S), folder="")


def seems_complete(cfg: Any, options: dict[str, Any]) -> bool:
    """Whether the manifest of the last epoch's checkpoint says that nothing is left to do: no cluster need start.

    A guess, made in no time: `launch` verifies the checkpoint, and starts a cluster if it has to.
    """
    run_dir = Path(cfg.OUTPUT, cfg.EXP_GROUP_PATH, cfg.TAG, cfg.EXTRA_TAG)
    path = run_dir / "ckpt" / f"checkpoint_epoch_{cfg.OPTIMIZATION.NUM_EPOCHS}" / "manifest.json"
    try:
        return options["resume"] == "auto" and json.loads(path.read_bytes())["metrics"] is not None
    except (OSError, ValueError, LookupError, TypeError):
        return False


def train_as_one_of_several(cfg: Any, args: argparse.Namespace, options: dict[str, Any]) -> Any:
    """The run in the processes that torchrun or Slurm has started, of which this is one; how it ended."""
    from raytrain.config.load import with_overrides

    size, name = os.environ["WORLD_SIZE"], launcher.name_here()
    if args.num_workers not in (None, size):
        raise ConfigError(
            f"--num_workers {args.num_workers}, but {name} has started {size} processes; leave the flag out"
        )
    if cfg.SCALE.MIN_WORKERS is not None:
        raise ConfigError(
            f"SCALE.MIN_WORKERS is {cfg.SCALE.MIN_WORKERS}, but {name} has started {size} processes, and so many "
            f"stay; set it to null (--set SCALE.MIN_WORKERS null), or train on Ray, without {name}"
        )
    from raytrain.launch import launch_as_one_of_several
    from raytrain.training.preflight import LaunchOptions

    return launch_as_one_of_several(with_overrides(cfg, ["SCALE.NUM_WORKERS", size]), LaunchOptions(**options))


def run_tune(args: argparse.Namespace) -> int:
    if (name := launcher.name_here()) is not None:
        raise ConfigError(
            f"{name} has started this process as one of several, but a sweep is one, which starts its trials on Ray; "
            f"start it without {name}"
        )
    cfg = load(args)
    check_output(cfg)
    from raytrain.cluster.cluster import starting_for_trials
    from raytrain.training.signals import signals_wish_stop

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals_wish_stop())
        starting_cluster = stack.enter_context(
            starting_for_trials(cfg, args.address)
        )  # while torch and Ray Tune are imported
        from raytrain.sweep.display import SweepDisplay
        from raytrain.sweep.tune import SweepOptions, tune

        if starting_cluster.note:
            print(f"note: {starting_cluster.note}", file=sys.stderr)
        display = SweepDisplay()
        stack.callback(display.leave)
        result = tune(
            cfg, SweepOptions(args.address, args.extend), display.show, stop=stop, starting_cluster=starting_cluster
        )
    display.close(result.view, time.time())
    for line in result.lines():
        say(line)
    return EXIT_STOPPED if result.status == "stopped" else EXIT_FINISHED


def run_eval(args: argparse.Namespace) -> int:
    take_launcher(args)
    if not prints_messages():  # one process evaluates, whatever has started several
        return EXIT_FINISHED
    cfg = load(args)
    if args.ckpt is not None and (args.ckpt_dir is not None or args.eval_all):
        raise ConfigError("--ckpt names one checkpoint, --ckpt_dir and --eval_all several; give one of them")
    if args.start_epoch is not None and not args.eval_all:
        raise ConfigError("--start_epoch says from which epoch on --eval_all evaluates; give both or neither")
    from raytrain.training.evaluate import checkpoints_in

    if not args.eval_all:
        evaluate_one(cfg, args, args.ckpt or args.ckpt_dir, args.eval_tag)
        return EXIT_FINISHED
    for path in checkpoints_in(cfg, args.ckpt_dir, args.start_epoch or 0):
        name = Path(path).stem
        is_of_epoch = name.startswith("checkpoint_epoch_")  # others share an epoch's folder
        evaluate_one(cfg, args, path, args.eval_tag if is_of_epoch else f"{args.eval_tag}/{name}")
    return EXIT_FINISHED


def evaluate_one(cfg: Any, args: argparse.Namespace, ckpt: str | None, eval_tag: str) -> None:
    """Evaluates a checkpoint, and says what came of it."""
    from raytrain.journal.display import metric_lines
    from raytrain.training.evaluate import evaluate

    evaluation = evaluate(
        cfg,
        ckpt,
        eval_tag=eval_tag,
        batch_size=args.batch_size,
        save_to_file=args.save_to_file,
        pretrained_model=args.pretrained_model,
        allow_partial=args.allow_partial,
    )
    say(f"{evaluation.checkpoint}")
    for line in metric_lines(evaluation.metrics, "metrics.json"):
        say(line)
    if args.infer_time:
        say(f"  {'infer time':<12} {evaluation.infer_time}")
    say(f"  {'results':<12} {evaluation.folder}")
    if evaluation.pictures:
        say(f"  {'pictures':<12} {evaluation.pictures}")
    for note in evaluation.notes:
        say(f"  note: {note}")
    if evaluation.warning:
        print(f"warning: {evaluation.warning}", file=sys.stderr)


def run_view(args: argparse.Namespace) -> int:
    cfg = load(args)
    from raytrain.training.evaluate import view

    seen = view(cfg, args.ckpt, count=args.count)
    say(seen.checkpoint or "no checkpoint: the data alone")
    for note in seen.notes:
        say(f"  note: {note}")
    for path in seen.pictures:
        say(f"  {path}")
    for note in seen.notes:
        say(f"  note: {note}")
    return EXIT_FINISHED


def run_prove(args: argparse.Namespace) -> int:
    cfg = load(args)
    from raytrain.proof.proof import prove

    try:
        return EXIT_FINISHED if prove(cfg, args.steps, args.only, say, args.timeout) else EXIT_FAILED
    except KeyboardInterrupt:
        print("raytrain: stopped; of what was tried nothing is left", file=sys.stderr)
        return EXIT_FAILED


def run_simulate(args: argparse.Namespace) -> int:
    simulation: dict[str, Any] = {}
    words, seed = list(args.set_words), args.seed
    if args.cfg_file is not None:
        from raytrain.config.load import load_config

        cfg = load_config(args.cfg_file, words)
        simulation, words = cfg.DATA_CONFIG.get("SIMULATION", {}), []
        seed = cfg.SEED if seed is None else seed
    if args.scenes is not None:
        simulation = {**simulation, "NUM_SCENES": {"train": args.scenes, "val": args.scenes}}
    simulate = importlib.import_module("raytrain.tasks.pointpillars.simulate")  # by its path, as all that is a task's
    splits = ("train", "val") if args.split == "both" else (args.split,)
    written = simulate.write_scenes(args.out, simulate.simulation_options(simulation, words), splits, seed or 0)
    say(f"{args.out}: {' and '.join(f'{number} scenes of {split}' for split, number in written.items())}")
    say(f"  train on them with --set DATA_CONFIG.SOURCE kitti DATA_CONFIG.DATA_PATH {args.out}")
    return EXIT_FINISHED


def run_checkpoints(args: argparse.Namespace) -> int:
    if args.run_dir in ("export", "import") and args.other is not None:
        return run_exchange(args)
    if args.to is not None:
        raise ConfigError("--to says where `checkpoints export RUN` writes; leave it out")
    if args.other is not None:
        return run_comparison(args)
    if (args.run_dir is None) == (args.cfg_file is None):
        raise ConfigError("give either the run folder or the config of the run (--cfg_file YAML)")
    cfg = load(args) if args.cfg_file is not None else None
    from rich.console import Console

    from raytrain.journal.run_folder import run_dir_of
    from raytrain.storage.storage import open_storage
    from raytrain.training.checkpoints import check_run_folder, rendered, shown_on, survey

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LISTING_COLUMNS)
    storage = open_storage(run_dir_of(cfg) if cfg else args.run_dir)
    check_run_folder(storage, of_config=cfg is not None)
    surveyed = survey(storage, cfg, args.verify, shown_on(console))
    say(rendered(surveyed, console, time.time()))
    return EXIT_FINISHED if surveyed.usable and not (args.verify and surveyed.damaged) else EXIT_FAILED


def run_exchange(args: argparse.Namespace) -> int:
    """A checkpoint to OpenPCDet, or one of its."""
    if args.run_dir == "export":
        from raytrain.training.exchange import export_checkpoint

        if args.cfg_file is not None:
            raise ConfigError("--cfg_file is for import; a checkpoint that is exported has its config with it")
        for written in export_checkpoint(args.other, args.to or "."):
            say(str(written))
        return EXIT_FINISHED
    from raytrain.training.exchange import import_checkpoint

    if args.cfg_file is None or args.to is not None:
        raise ConfigError("import puts a file into the run folder of a config: give --cfg_file YAML, and not --to")
    path, notes = import_checkpoint(args.other, load(args))
    say(path)
    for note in notes:
        say(f"  note: {note}")
    return EXIT_FINISHED


def run_comparison(args: argparse.Namespace) -> int:
    """A and B compared. As of `diff`, 1 says that they differ, so what is wrong with one of them has another status."""
    of_one = ["--cfg_file", "--verify", *CONFIG_FLAGS, *SWITCHES]
    given = [flag for flag in of_one if vars(args)[flag[2:]]] + ["--set"] * bool(args.set_words)
    if given:
        raise ConfigError(f"{given[0]} is about one run, and here two are compared; name them: checkpoints A B")
    from raytrain.training.comparison import compared

    try:
        comparison = compared([args.run_dir, args.other])
    except RaytrainError as error:
        error.exit_status = EXIT_USAGE
        raise
    for line in comparison.lines:
        say(line)
    return EXIT_FINISHED if comparison.is_same else EXIT_FAILED


def run_show_config(args: argparse.Namespace) -> int:
    if args.reference == (args.cfg_file is not None):
        raise ConfigError("give either the config to show (--cfg_file YAML) or --reference, which is of no file")
    if args.reference:
        from raytrain.config.reference import reference
        from raytrain.config.sections import Config

        say(reference(Config))
        return EXIT_FINISHED
    from raytrain.config.load import dump_config

    say(dump_config(load(args)).rstrip("\n"))
    return EXIT_FINISHED


def say(text: str) -> None:
    """Prints it; that nobody reads any more (`raytrain ... | head`) is no error, a full disk is."""
    try:
        print(masked(text), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit has a place to go
        if not isinstance(error, BrokenPipeError):
            raise StorageError(
                f"standard output: cannot print there: {error.strerror}. Free some space, or send it elsewhere"
            ) from None


if __name__ == "__main__":
    sys.exit(main())
