"""`raytrain checkpoints A B`: whether two runs or checkpoints are the same bits; else where they part, by how much.

Manifests say where to look: the fingerprints of the steps at which both have a checkpoint. What is then told of one is
read in full, and never of a checkpoint whose bytes are not those that its manifest vouches for.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from raytrain.config.load import config_diff, load_config
from raytrain.errors import CheckpointError, ConfigError, PreflightError, masked
from raytrain.journal.run_folder import run_dir_of
from raytrain.storage.checkpoint import MANIFEST, PAYLOAD, Manifest, check_sha256, damage_named, read_manifest
from raytrain.storage.fingerprint import DIGITS, Print, Prints, TensorName, owner_of, prints_of, tensors_in
from raytrain.storage.paths import expanded, parent_and_name
from raytrain.storage.state_file import dumps, load_file, load_payload
from raytrain.storage.storage import Storage, open_storage
from raytrain.storage.store import FOLDER, listed
from raytrain.training.checkpoints import check_run_folder
from raytrain.training.resume import FREE, parent_storage

SHOWN = 10  # tensors, keys, steps that are named
APART = (*FREE, "CHECKPOINT.", "EVAL.")  # no weight follows from these
TOLD = ("SEED", "SCALE.VIRTUAL_WORKERS", "OPTIMIZATION.BATCH_SIZE_PER_GPU", "OPTIMIZATION.ACCUMULATE")  # by the world


@dataclasses.dataclass(frozen=True)
class Single:
    """One checkpoint: file `name` of a storage. manifest: None of a bare .pth"""

    storage: Storage
    name: str
    manifest: Manifest | None

    @property
    def path(self) -> str:
        return masked(self.storage.path_of(self.name))

    @functools.cached_property
    def step(self) -> int | None:
        """Steps taken; None of a file that does not say it."""
        return self.manifest.progress.step if self.manifest else self.prints.step

    @functools.cached_property
    def prints(self) -> Prints:
        """Of its tensors, after every byte was checked."""
        folder, _, file = self.name.rpartition("/")
        with damage_named(self.path), self.storage.local_copy(self.name) as path, path.open("rb") as stream:
            if self.manifest is not None:
                check_sha256(stream, self.storage.path_of(folder), file, self.manifest)
            try:
                return prints_of(mapped(stream))
            except CheckpointError:
                loaded = load_file(path)  # of before there were archives: written anew as one
            try:
                return prints_of(memoryview(dumps(loaded)))
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from error

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[tuple[int, str], torch.Tensor]]:
        """The model's and the optimizer's, as Prints has them."""
        if self.manifest is not None:
            payload = load_payload(self.storage, self.name.rpartition("/")[0])
        else:
            with self.storage.local_copy(self.name) as path:
                payload = load_file(path)
        return tensors_in(payload, lambda value: value if isinstance(value, torch.Tensor) else None)


@dataclasses.dataclass(frozen=True)
class Side:
    """A or B. path: for people;  checkpoints: a run's, oldest first, or just one;  notes: what was passed over"""

    path: str
    checkpoints: list[Single]
    is_run: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two checkpoints that are compared with each other."""

    a: Single
    b: Single

    def seems_same(self) -> bool | None:
        """What the manifests say of it, if both do."""
        a, b = self.a.manifest, self.b.manifest
        return a.weights == b.weights if a and b and a.weights and b.weights else None

    @property
    def is_numbered(self) -> bool:
        """Whether one of them has no names for the optimizer's moments: then both go by number."""
        return not (self.a.prints.parameters and self.b.prints.parameters)

    def by_name(self) -> tuple[dict[TensorName, Print], dict[TensorName, Print]]:
        """Of both, read in full."""
        return self.a.prints.by_name(self.is_numbered), self.b.prints.by_name(self.is_numbered)

    def differing(self) -> dict[TensorName, tuple[Print | None, Print | None]]:
        """The tensors that are not the same in both; None where there is none of that name."""
        a, b = self.by_name()
        return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}

    def weights(self) -> tuple[str, str]:
        """Both fingerprints, as people are shown them."""
        of_a, of_b = (side.prints.fingerprint(self.is_numbered)[:DIGITS] for side in (self.a, self.b))
        return of_a, of_b


@dataclasses.dataclass(frozen=True)
class Distance:
    """By how much a tensor differs. count: of elements whose bits differ; the largest difference, as such and as a
    share of the larger of the two; None where one of the two is NaN or infinite and the other is not the same."""

    count: int
    of: int
    absolute: float | None
    relative: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is to be told. is_same: whether the newest states, and all before them, are the same bits"""

    is_same: bool
    lines: list[str]


def compared(words: Sequence[str]) -> Comparison:
    """What A and B, as they stand on the command line, have in common.

    Errors say what is wrong with one of them: then nothing is known.
    """
    sides = [side_of(word) for word in words]
    if identity(sides[0].path) == identity(sides[1].path):
        raise ConfigError(f"A and B are both {sides[0].path}; give two runs or checkpoints")
    pairs = pairs_of(*sides)
    verdicts = verdicts_of(pairs)
    lines = [f"{letter}  {side.path}" for letter, side in zip("AB", sides, strict=True)]
    of_runs = sides[0].is_run and sides[1].is_run
    if all(verdicts) and not pairs[-1].differing():
        lines.append(same_line(pairs))
        is_same = True
    else:
        is_same = False
        lines += difference_lines(pairs, verdicts, of_runs)
    lines += circumstances(pairs[-1])
    return Comparison(is_same, [*lines, *sides[0].notes, *sides[1].notes])


def side_of(word: str) -> Side:
    """A run folder, the YAML of a run, a checkpoint folder or a .pth, by a path or a URI."""
    path = word
    if "://" not in word:
        path = str(expanded(word).absolute())
        if path.endswith((".yaml", ".yml")) and Path(path).is_file():
            return run_side(open_storage(run_dir_of(load_config(word))), of_config=True)
    parent, name = parent_and_name(path)
    if name.endswith(".pth") or Path(path).is_file():
        return file_side(open_storage(parent), name)
    storage = open_storage(path)
    if storage.exists(MANIFEST) or storage.exists(PAYLOAD):
        return checkpoint_side(open_storage(parent), name)
    return run_side(storage)


def file_side(storage: Storage, name: str) -> Side:
    """A .pth: with its manifest if it has one beside it."""
    path = masked(storage.path_of(name))
    if not storage.exists(name):
        raise PreflightError(f"{path}: there is no such file")
    if name == PAYLOAD and storage.exists(MANIFEST):
        return checkpoint_side(*parent_storage(storage.path_of("")))
    return Side(path, [Single(storage, name, None)])


def checkpoint_side(storage: Storage, name: str) -> Side:
    """A checkpoint folder."""
    single = Single(storage, f"{name}/{PAYLOAD}", read_manifest(storage, name))
    return Side(masked(storage.path_of(name)), [single])


def run_side(storage: Storage, of_config: bool = False) -> Side:
    """All of a run's checkpoints that have a manifest."""
    path = masked(storage.path_of(""))
    check_run_folder(storage, of_config)
    entries = list(reversed(listed(storage)))
    notes = [f"passed over {path}: {entry.name}: {entry.damage}" for entry in entries if entry.manifest is None]
    singles = [Single(storage, f"{FOLDER}/{e.name}/{PAYLOAD}", e.manifest) for e in entries if e.manifest is not None]
    if not singles:
        raise CheckpointError("\n".join([f"{path}: this run has no checkpoint to compare", *notes]))
    return Side(path, singles, is_run=True, notes=notes)


def identity(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def pairs_of(a: Side, b: Side) -> list[Pair]:
    """What is to be compared, oldest first: two checkpoints, or what both have of the same steps."""
    if not (a.is_run or b.is_run):
        return [Pair(a.checkpoints[0], b.checkpoints[0])]
    of_b = {single.step: single for single in b.checkpoints if single.step is not None}
    pairs = [Pair(single, of_b[single.step]) for single in a.checkpoints if single.step in of_b]
    if not pairs:
        steps = [listed_steps([single.step for single in side.checkpoints]) for side in (a, b)]
        raise PreflightError(
            f"A and B have no checkpoint of the same step: A has {steps[0]}, B has {steps[1]}. Train both with the "
            "same CHECKPOINT section (EVERY_STEPS, KEEP_LAST), or give one checkpoint of each"
        )
    return pairs


def verdicts_of(pairs: Sequence[Pair]) -> list[bool]:
    """Whether each is the same bits, by the manifests where they say so.

    The first that is not is read: other fingerprints may be those of a file without names of the moments.
    """
    verdicts: list[bool] = []
    for pair in pairs:
        verdict = pair.seems_same()
        if verdict is None or (not verdict and False not in verdicts):
            verdict = not pair.differing()
        verdicts.append(verdict)
    return verdicts


def listed_steps(steps: Sequence[int | None]) -> str:
    named = ["no step" if step is None else f"{step:,}" for step in steps[-SHOWN:]]
    return f"{'..., ' if len(steps) > SHOWN else ''}{', '.join(named)}"


def mapped(stream: IO[bytes]) -> memoryview:
    """The bytes of an open file, which are read as they are looked at."""
    size_bytes = os.fstat(stream.fileno()).st_size
    return memoryview(mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_READ) if size_bytes else b"")


def at(pair: Pair) -> str:
    """`at step 40`, of the two checkpoints."""
    a, b = ("an unknown step" if each.step is None else f"step {each.step:,}" for each in (pair.a, pair.b))
    return f"at {a}" if a == b else f"at {a} of A and {b} of B"


def same_line(pairs: Sequence[Pair]) -> str:
    before = listed_steps([pair.a.step for pair in pairs[:-1]])
    also = f"; and at each step before it that both have kept: {before}" if len(pairs) > 1 else ""
    return f"the same bits {at(pairs[-1])}: weights {pairs[-1].weights()[0]}{also}"


def difference_lines(pairs: Sequence[Pair], verdicts: Sequence[bool], of_runs: bool) -> list[str]:
    """Where they part, which tensors differ there and by how much, and how far apart the newest ones are."""
    first = verdicts.index(False) if False in verdicts else len(pairs) - 1
    same = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict]
    lines = [f"not the same bits {at(pairs[first])}: weights {' and '.join(pairs[first].weights())}"]
    if same:
        lines.append(f"the same bits last {at(same[-1])}")
    elif of_runs:
        lines.append("no step before it has a checkpoint in both")
    lines += tensor_lines(pairs[first], pairs[first].differing())
    if first < len(pairs) - 1 and not verdicts[-1]:
        lines.append(newest_line(pairs[-1]))
    return lines


def tensor_lines(pair: Pair, differing: dict[TensorName, tuple[Print | None, Print | None]]) -> list[str]:
    """A table of the tensors that differ, the model's first."""
    distances = distances_of(pair, differing)
    names = sorted(differing, key=lambda name: bool(name.moment))
    rows = [("", "elements", "at most", "relative")]
    rows += [row_of(name, differing[name], distances.get(name)) for name in names[:SHOWN]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    total = len(set(pair.by_name()[0]) | set(pair.by_name()[1]))
    lines = [f"{len(differing)} of {total} tensors differ:"]
    lines += [
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
    ]
    return [*lines, *([f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])]


def row_of(
    name: TensorName, prints: tuple[Print | None, Print | None], distance: Distance | None
) -> tuple[str, str, str, str]:
    a, b = prints
    if a is None or b is None:
        return str(name), f"only {'B' if a is None else 'A'} has it", "", ""
    if distance is None:
        kinds = [f"{print_.dtype} {list(print_.shape)}" for print_ in (a, b)]
        return str(name), " and ".join(kinds), "", ""
    share = f"{distance.count:,} of {distance.of:,}"
    return str(name), share, number_of(distance.absolute), number_of(distance.relative)


def number_of(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def newest_line(pair: Pair) -> str:
    """How far apart the newest ones are."""
    differing = pair.differing()
    absolutes = [distance.absolute for distance in distances_of(pair, differing).values()]
    most = None if None in absolutes else max((each for each in absolutes if each is not None), default=0.0)
    return f"{at(pair)}, the newest that both have kept, {len(differing)} tensors differ, by {number_of(most)} at most"


def distances_of(
    pair: Pair, differing: dict[TensorName, tuple[Print | None, Print | None]]
) -> dict[TensorName, Distance]:
    """By how much those differ that have the same dtype and shape in both."""
    like = {name for name, (a, b) in differing.items() if a and b and (a.dtype, a.shape) == (b.dtype, b.shape)}
    if not like:
        return {}
    a, b = (named_tensors(single, pair.is_numbered) for single in (pair.a, pair.b))
    return {name: distance(a[name], b[name]) for name in differing if name in like and name in a and name in b}


def named_tensors(single: Single, numbered: bool) -> dict[TensorName, torch.Tensor]:
    model, moments = single.tensors()
    names = [] if numbered else single.prints.parameters
    owned = {TensorName(owner_of(n, names), moment): tensor for (n, moment), tensor in moments.items()}
    return {**{TensorName(name): tensor for name, tensor in model.items()}, **owned}


def distance(a: torch.Tensor, b: torch.Tensor) -> Distance:
    """Of two tensors of one dtype and shape."""
    bits = [each.detach().contiguous().reshape(-1, 1).view(torch.uint8) for each in (a, b)]
    differs = (bits[0] != bits[1]).any(1)
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = (each.detach().reshape(-1)[differs].to(wide) for each in (a, b))
    apart, larger = (x - y).abs(), torch.maximum(x.abs(), y.abs())
    if not bool(apart.isfinite().all()):
        return Distance(int(differs.sum()), a.numel(), None, None)
    relative = torch.where(larger > 0, apart / larger, 0.0)
    return Distance(int(differs.sum()), a.numel(), float(apart.max()), float(relative.max()))


def circumstances(pair: Pair) -> list[str]:
    """A line for what the two were made with that is not the same, and may explain what differs."""
    a, b = pair.a.manifest, pair.b.manifest
    if a is None or b is None:
        return ["made with: not known of a file without manifest"]
    idle = ("built", "reduction") if a.world.get("exact") and b.world.get("exact") else ("built",)
    worlds = [{k: v for k, v in manifest.world.items() if k not in idle} for manifest in (a, b)]
    changes = config_diff({"seed": a.seed, **worlds[0]}, {"seed": b.seed, **worlds[1]})
    keys = [each for each in config_diff(a.config, b.config) if not each[0].startswith(APART) and each[0] not in TOLD]
    code = [file for file, *_ in config_diff(dict(a.source), dict(b.source))]
    parts = [f"{key} {before} and {after}" for key, before, after in [*changes, *keys]]
    parts += [f"other code in {', '.join(code[:SHOWN])}"] if code else []
    if not parts:
        return ["made with: the same config, seed, workers and code, as far as the manifests tell"]
    more = f", and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return [f"made with, A and B: {', '.join(parts[:SHOWN])}{more}"]
