"""Every section and key of a config, with types, defaults and what is refused.

A comment that begins with `#:` says what the key means; `raytrain show-config --reference` prints it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raytrain.config.distributions import distribution
from raytrain.config.environment import checked_pattern
from raytrain.config.schema import Tree, plain, section_in


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def stays_below(name: str) -> bool:
    """Whether a folder of this name lies below the one that it is joined to, and is one that people can type."""
    return not name.startswith("/") and ".." not in name.split("/") and name.isprintable()


def _folder(value: str) -> str:
    if not stays_below(value):
        raise ValueError("it must be a folder name below OUTPUT: neither absolute nor with `..` or control characters")
    return value


def _dotted_path(value: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", value):
        raise ValueError("it must be pkg.module:Class, for example raytrain.tasks.digits:DigitsTask")
    return value


def _drawable(value: Any) -> Any:
    distribution(value)
    return value


Flag = Annotated[bool, Field(strict=True)]
Natural = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0)]
Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1)]
NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Decay = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)]  # of a running mean
Pair = Annotated[list[Decay], Field(min_length=2, max_length=2)]
Seed = Annotated[Natural, Field(le=2**32 - 1)]  # numpy takes no larger one
Folder = Annotated[str, AfterValidator(_folder)]
FolderName = Annotated[str, Field(min_length=1), AfterValidator(_folder)]


class Section(BaseModel):
    """A mapping whose keys are all known here. What was decided when the run began does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Spike(Section):
    """A loss or gradient norm above FACTOR x the median of the last WINDOW good steps is one."""

    #: times the median; above it a step is a spike
    FACTOR: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=1)] = 10.0
    WINDOW: Annotated[Count, Field(le=65536)] = 100  #: good steps that the median is taken of
    ACTION: Literal["skip", "rollback", "stop"] = "skip"  #: as NONFINITE


class Phase(Section):
    """What holds in OPTIMIZATION's place from an epoch on. A key that is not given stays as it was.

    Iterate over it, as dict() does: that gives only what was given. The defaults are never read.
    """

    FROM_EPOCH: Count  #: epochs finished when it begins
    LR: Positive = 0.0  #: as OPTIMIZATION.LR
    GRAD_NORM_CLIP: Positive | None = None  #: as OPTIMIZATION.GRAD_NORM_CLIP
    WEIGHT_DECAY: NonNegative = 0.0  #: as OPTIMIZATION.WEIGHT_DECAY

    def __iter__(self) -> Generator[tuple[str, Any], None, None]:
        """The keys that were given, with their values."""
        yield from ((key, value) for key, value in super().__iter__() if key in self.model_fields_set)

    @model_validator(mode="after")
    def _sets_something(self) -> Phase:
        keys = [key for key in type(self).model_fields if key != "FROM_EPOCH"]
        if self.model_fields_set.isdisjoint(keys):
            raise ValueError(f"it sets nothing; give it at least one of {', '.join(keys)}")
        return self


class Optimization(Section):
    """OpenPCDet's keys; those after AMP_DTYPE are raytrain's."""

    #: what steps the weights; also chooses SCHEDULER
    OPTIMIZER: Literal["adam", "sgd", "adam_onecycle", "adam_cosineanneal", "adamw"] = "adam_onecycle"
    BATCH_SIZE_PER_GPU: Count  #: samples in a micro-batch of one virtual worker
    NUM_EPOCHS: Count  #: epochs to train, also the length of the schedule
    LR: Positive = 0.003  #: learning rate, where the schedule is at its highest
    WEIGHT_DECAY: NonNegative = 0.01  #: beside the gradient; adam and sgd have it in the gradient
    MOMENTUM: Decay = 0.9  #: of SGD
    MOMS: Pair = [0.95, 0.85]  #: beta1 under schedule onecycle or cosine: at the ends, at the peak
    BETAS: Pair | None = None  #: of adam and adamw; null: 0.9 and 0.999. Under onecycle and cosine the first is MOMS's
    PCT_START: Annotated[Positive, Field(lt=1)] = 0.4  #: share of the run in which onecycle rises
    #: onecycle and LR_WARMUP begin at LR / DIV_FACTOR
    DIV_FACTOR: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1)] = 10.0
    DECAY_STEP_LIST: list[Natural] = []  #: epochs at which the step schedule multiplies by LR_DECAY
    LR_DECAY: Annotated[Positive, Field(le=1)] = 0.1  #: factor of each decay
    LR_CLIP: NonNegative = 1e-7  #: the step schedule stays above it
    LR_WARMUP: Flag = False  #: a rise before the step and the constant schedule
    WARMUP_EPOCH: Count = 1  #: epochs that LR_WARMUP takes
    WARMUP_ITER: Natural = 500  #: steps in which the cosine schedule rises; not reached by a shorter run
    GRAD_NORM_CLIP: Positive | None = 10.0  #: largest L2 norm of the gradient; null: it is not clipped
    LOSS_SCALE_FP16: Positive | None = None  #: first loss scale of fp16; null: 65536
    USE_AMP: Flag = False  #: mixed precision
    AMP_DTYPE: Literal["fp16", "bf16"] = "fp16"  #: in which type USE_AMP computes
    #: how the learning rate moves; null: as fits OPTIMIZER
    SCHEDULER: Literal["step", "onecycle", "cosine", "constant"] | None = None
    ACCUMULATE: Count = 1  #: micro-batches in a step
    SYNC_BN: Flag = False  #: BatchNorm over the samples of all workers
    #: what a step leaves in BatchNorm's statistics and the like: virtual worker 0's, or the mean over all
    BUFFERS: Literal["first", "mean"] = "first"
    LEGACY_PARAM_GROUPS: Flag = False  #: leave out the parameters that OpenPCDet leaves out
    ENGINE: Literal["auto", "flat", "ddp"] = "auto"  #: flat buffers, or parameter by parameter; auto: flat if it can
    TF32: Flag = False  #: f32 products rounded to 10 bits of mantissa, on GPUs that have it
    CHANNELS_LAST: Flag = False  #: memory format of the model and of a batch's images (B, C, H, W)
    COMPILE: Flag = False  #: torch.compile
    CUDA_GRAPHS: Flag = False  #: of what COMPILE makes
    NONFINITE: Literal["skip", "rollback", "stop"] = "skip"  #: what a loss or gradient that is not finite leads to
    NONFINITE_LIMIT: Count = 10  #: steps without effect in a row, for that or for a spike, that end the run
    ROLLBACK_EVERY: Count = 100  #: steps between the states that a rollback returns to; one is kept in memory
    SPIKE: Spike | None = None  #: what a loss or gradient far above the usual leads to; null: nothing
    PHASES: list[Phase] = []  #: other values from some epochs on

    def in_force(self, epoch: int) -> Optimization:
        """A copy with the values that hold after `epoch` finished epochs."""
        begun = (dict(phase) for phase in self.PHASES if epoch >= phase.FROM_EPOCH)
        values = {key: value for phase in begun for key, value in phase.items() if key != "FROM_EPOCH"}
        return self.model_copy(update=values)

    @field_validator("PHASES")
    @classmethod
    def _in_order(cls, value: list[Phase]) -> list[Phase]:
        epochs = [phase.FROM_EPOCH for phase in value]
        if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
            raise ValueError(
                f"each phase must begin after the one before; found FROM_EPOCH {', '.join(map(str, epochs))}"
            )
        return value

    @field_validator("CUDA_GRAPHS")
    @classmethod
    def _compiled(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("COMPILE", True):
            raise ValueError("torch makes CUDA graphs of compiled models; set COMPILE to true")
        return value


class DisableAugmentation(Section):
    DISABLE_AUG_LIST: list[str]  #: names of the augmentations that end
    NUM_LAST_EPOCHS: Natural  #: so many epochs before the end


class Hook(Section):
    #: the last epochs go without some augmentations; for tasks that have them
    DisableAugmentationHook: DisableAugmentation | None = None


class Scale(Section):
    """What the run takes of the cluster."""

    NUM_WORKERS: Natural | None = None  #: worker processes; 0: this one, without Ray; null: what fits
    #: of an elastic run the fewest worker processes, NUM_WORKERS being the most; null: always NUM_WORKERS
    MIN_WORKERS: Count | None = None
    GROW_EVERY: Positive = 60.0  #: seconds between two looks for room for more workers
    #: shares of a batch, fixed for a run's life; null: as many as it first has workers
    VIRTUAL_WORKERS: Annotated[Count, Field(le=65536)] | None = None
    USE_GPU: Literal["auto"] | Flag = "auto"  #: one GPU for each worker; auto: where there are enough
    CPUS_PER_WORKER: Positive = 1.0  #: that Ray sets aside for each worker
    GPUS_PER_WORKER: Positive = 1.0  #: that Ray sets aside for each worker, where GPUs are used
    RESOURCES: dict[str, NonNegative] = {}  #: custom Ray resources of each worker: {name: amount}
    #: environment variables of the command that workers get: names, or PREFIX*
    ENV: list[Annotated[str, AfterValidator(checked_pattern)]] = []
    REDUCTION: Literal["auto", "shared_memory", "collective"] = "auto"  #: how gradients are summed over processes
    #: whether gradients are added in one order, whatever the number of worker processes; auto: where that costs nothing
    EXACT: Literal["auto"] | Flag = "auto"
    THREADS: Annotated[Count, Field(le=1024)] = 1  #: torch's, in each worker
    #: restarts in a row without a new step; -1: no limit; null: 2 where a process dies, 0 where the task's code raises
    MAX_FAILURES: Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=-1)] | None = None
    HANG_TIMEOUT: Positive | None = 1200.0  #: seconds without progress until a worker is killed; null: never

    @property
    def is_elastic(self) -> bool:
        """Whether the number of worker processes may change while the run trains."""
        return self.MIN_WORKERS is not None and self.MIN_WORKERS != self.NUM_WORKERS

    @field_validator("MIN_WORKERS")
    @classmethod
    def _fewest(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("NUM_WORKERS")
        if value is not None and most == 0:
            raise ValueError("NUM_WORKERS is 0, so the run stays in this process; leave it out, or set it to null")
        if value is not None and most is not None and value > most:
            raise ValueError(f"NUM_WORKERS is {most}, which is the most; it must be that or less, or null")
        return value

    @field_validator("VIRTUAL_WORKERS")
    @classmethod
    def _enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        workers = info.data.get("NUM_WORKERS")
        if value is not None and workers is not None and value < workers:
            raise ValueError(f"NUM_WORKERS is {workers}; it must be at least that, or null")
        return value

    @field_validator("RESOURCES")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name.upper() in ("CPU", "GPU"):
                raise ValueError(f"{name} is set by {name.upper()}S_PER_WORKER; RESOURCES is for custom resources")
        return value


class Loader(Section):
    WORKERS: Natural = 2  #: loader processes of each worker; 0: it loads by itself
    PREFETCH: Annotated[Count, Field(le=1024)] = 2  #: batches that each of them keeps ready
    SHUFFLE: Flag = True  #: another order each epoch; false: that of the data set
    #: the last batch of an epoch, if it is not whole: trained as it is, left out, or filled up with first samples
    LAST: Literal["keep", "drop", "pad"] = "keep"


class Checkpoint(Section):
    """When to save and what to keep; the end of a run is always saved."""

    EVERY_EPOCHS: Count | None = 1  #: epochs between checkpoints; null: none for an epoch's sake
    EVERY_STEPS: Count | None = None  #: steps between checkpoints
    #: seconds between checkpoints; auto: as often as OVERHEAD allows, once a minute at most
    EVERY_SECONDS: Literal["auto"] | Positive | None = "auto"
    OVERHEAD: Annotated[Positive, Field(lt=1)] = 0.01  #: share of the time that saving may take
    #: steps between states in memory; auto: as OVERHEAD allows
    SNAPSHOT_EVERY: Literal["auto"] | Count | None = "auto"
    #: newest checkpoints that are kept, those saved for time alone (EVERY_SECONDS) only after those asked for
    KEEP_LAST: Count = 5
    METRIC: str | None = None  #: metric of the task's score, by which checkpoints are best
    MODE: Literal["max", "min"] = "max"  #: whether more of METRIC is better
    KEEP_BEST: Natural = 0  #: best checkpoints that are kept besides

    @field_validator("KEEP_BEST")
    @classmethod
    def _measured(cls, value: int, info: ValidationInfo) -> int:
        if value > 0 and "METRIC" in info.data and not info.data["METRIC"]:
            raise ValueError("nothing says which are best; set CHECKPOINT.METRIC to one of the task's metrics")
        return value


class Eval(Section):
    EVERY: Count | None = 1  #: epochs between evaluations; null: only at the end
    LAST_EPOCHS: Natural = 0  #: so many epochs before the last are each evaluated besides
    PICTURES: Natural = 4  #: that a task draws at the first evaluation, at the end of training and in `raytrain eval`

    def due(self, epoch: int, num_epochs: int) -> bool:
        """Whether there is an evaluation after so many finished epochs of a run of `num_epochs`."""
        is_of_last = num_epochs - self.LAST_EPOCHS <= epoch <= num_epochs
        return is_of_last or (self.EVERY is not None and epoch % self.EVERY == 0)


class Log(Section):
    EVERY: Count = 10  #: steps between journal records
    LINE_EVERY: Count = 50  #: steps between lines of the log file


class Budget(Section):
    """What a sweep may take before it ends; None: no limit."""

    EPOCHS: Count | None = None  #: of all trials together
    SECONDS: Positive | None = None  #: of the sweep's wall time


BOHB_REMOVED = (
    "BOHB was removed; use SEARCH tpe with SCHEDULER hyperband or, so that later trials learn from earlier ones, asha"
)


class Tune(Section):
    """A sweep over this config: `raytrain tune`."""

    #: what to vary: dotted key: {range: [...]}
    SPACE: dict[str, Annotated[dict[str, Any], BeforeValidator(_drawable)]] = {}
    METRIC: str | None = None  #: what trials are compared by; null: CHECKPOINT.METRIC, else loss
    #: whether more of it is better; null: CHECKPOINT.MODE for its metric, min for loss, else max
    MODE: Literal["max", "min"] | None = None
    NUM_SAMPLES: Count = 10  #: trials; times the combinations of the SPACE's grids
    SCHEDULER: Literal["none", "asha", "hyperband", "median", "pbt", "pb2"] = "none"  #: what ends trials early
    SEARCH: Literal["random", "grid", "tpe", "gp"] = "random"  #: what chooses the next trial
    BUDGET: Budget = Budget()  #: what the sweep may take before it ends
    CONCURRENT: Count | None = None  #: trials at a time; null: what the cluster holds
    SEED: Seed | None = None  #: seed of what the sweep draws; null: the config's
    CONSTANTS: dict[str, Any] = {}  #: dotted key: what it is in every trial
    MAX_FAILED: Natural = 3  #: failed trials that the sweep bears
    UNIT: Literal["epoch", "step"] = "epoch"  #: of GRACE and PERTURB_EVERY
    GRACE: Count = 1  #: asha, median: no trial is ended before
    #: asha, hyperband: one trial of so many goes on
    REDUCTION: Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=2)] = 3
    PERTURB_EVERY: Count = 2  #: pbt, pb2: how long a generation is
    QUANTILE: Annotated[Positive, Field(le=0.5)] = 0.25  #: pbt, pb2: the worst share goes on from the best
    RESAMPLE: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.25  #: pbt: chance of a new value over a near one

    @field_validator("SCHEDULER", "SEARCH", mode="before")
    @classmethod
    def _without_bohb(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() == "bohb":
            raise ValueError(BOHB_REMOVED)
        return value


class Config(Section):
    """Everything that decides a run. MODEL, DATA_CONFIG and CLASS_NAMES belong to the task."""

    TASK: Annotated[str, AfterValidator(_dotted_path)]  #: what is trained: pkg.module:Class
    SEED: Seed = 0  #: seed of all that is random
    #: root of the run folders: a folder, or a URI such as s3://bucket/runs
    OUTPUT: Annotated[str, Field(min_length=1)] = "output"
    TAG: FolderName = "run"  #: part of the run folder; else the name of the YAML file
    EXP_GROUP_PATH: Folder = ""  #: part of the run folder; else the folders of the YAML file below configs/ or cfgs/
    EXTRA_TAG: FolderName = "default"  #: last part of the run folder
    CFG_FILE: str = (
        ""  #: the YAML file that it was read from, filled in: by it runs of files of one name are told apart
    )
    CLASS_NAMES: list[str] = []  #: the task's own
    DATA_CONFIG: Tree = Tree()  #: the task's own
    MODEL: Tree = Tree()  #: the task's own
    OPTIMIZATION: Optimization  #: how it is trained
    HOOK: Hook | None = None  #: OpenPCDet's
    SCALE: Scale = Scale()  #: what the run takes of the machine or the cluster
    LOADER: Loader = Loader()  #: how samples are loaded
    CHECKPOINT: Checkpoint = Checkpoint()  #: when to save and what to keep; the end of a run is always saved
    EVAL: Eval = Eval()  #: when to evaluate
    LOG: Log = Log()  #: how often to record
    TUNE: Tune = Tune()  #: a sweep over this config

    @model_validator(mode="before")
    @classmethod
    def _without_empty_sections(cls, data: Any) -> Any:
        """A section with nothing under its key (`SCALE:`) has its defaults."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        empty = [key for key, value in data.items() if value is None and key in fields and _is_section(fields[key])]
        return {key: value for key, value in data.items() if key not in empty}

    def to_tree(self) -> dict[str, Any]:
        """The whole configuration as plain dicts, lists and scalars."""
        return plain(self)


def _is_section(field: Any) -> bool:
    return field.annotation is Tree or section_in(field.annotation) is not None
