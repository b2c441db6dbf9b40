"""What each trial takes of the cluster, at least, and so how many train at a time."""

from __future__ import annotations

import dataclasses

from raytrain.cluster.on_ray import check_elastic
from raytrain.cluster.resources import check_resources, fitting_workers, resolve_workers, resources_per_worker
from raytrain.config.load import with_values
from raytrain.config.sections import Config
from raytrain.errors import PreflightError
from raytrain.sweep.space import workers_of_trial


@dataclasses.dataclass(frozen=True)
class TrialResources:
    """What a trial takes of the cluster, and how many do at a time.

    least: of num_workers, if it is elastic: these it has as long as it trains
    """

    num_workers: int
    least: int
    virtual_workers: int
    use_gpu: bool
    per_worker: dict[str, float]
    concurrent: int

    @staticmethod
    def of(cfg: Config) -> TrialResources:
        """PreflightError where the cluster cannot hold them."""
        _, use_gpu = resolve_workers(cfg.SCALE)
        num_workers, virtual_workers = workers_of_trial(cfg)
        least = num_workers
        if cfg.SCALE.is_elastic:
            check_elastic(cfg.SCALE)
            least = cfg.SCALE.MIN_WORKERS or 1
        per_worker = resources_per_worker(cfg.SCALE, use_gpu)
        check_resources(least, per_worker)
        concurrent = concurrency(cfg.TUNE.CONCURRENT, least, per_worker)
        return TrialResources(num_workers, least, virtual_workers, use_gpu, per_worker, concurrent)

    @property
    def is_elastic(self) -> bool:
        return self.least < self.num_workers

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A trial of one worker trains in its own process; several are others, beside one that takes nothing."""
        return [self.per_worker] if self.num_workers == 1 else [{}, *[self.per_worker] * self.least]

    def settled(self, cfg: Config) -> Config:
        """What the config leaves open, as it is for each trial."""
        scale = {
            "MIN_WORKERS": self.least if self.is_elastic else None,
            "NUM_WORKERS": self.num_workers if self.num_workers > 1 else 0,
            "VIRTUAL_WORKERS": self.virtual_workers,
            "USE_GPU": self.use_gpu,
        }
        return with_values(cfg, {f"SCALE.{key}": value for key, value in scale.items()})


def concurrency(wanted: int | None, num_workers: int, per_worker: dict[str, float]) -> int:
    """Trials at a time: as many as the cluster holds, or TUNE.CONCURRENT; PreflightError if it cannot hold those."""
    fitting = fitting_workers(per_worker) // num_workers
    if wanted is not None and wanted > fitting:
        each = f"{num_workers} workers" if num_workers > 1 else "one worker"
        raise PreflightError(
            f"TUNE.CONCURRENT is {wanted}, but this cluster can hold only {fitting} trials of {each} at a time; lower "
            "it, leave it out (as many as fit), or give each less (--set SCALE.CPUS_PER_WORKER 0.5)"
        )
    return wanted or fitting
