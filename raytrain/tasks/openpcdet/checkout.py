"""Where pcdet is, and its import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from raytrain.errors import TaskError, users_traceback
from raytrain.tasks.openpcdet import adapted

PACKAGE = "pcdet/__init__.py"


class Checkout:
    """A folder with pcdet in it, or None for the installed package. To load a pickled one imports pcdet from there."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return _imported, (self.folder,)

    def use(self) -> ModuleType:
        """pcdet, imported and adapted.   TaskError if it is not there, or another is."""
        adapted.finder()
        if self.folder is not None and str(self.folder) not in sys.path:
            sys.path.insert(0, str(self.folder))
        try:
            pcdet = importlib.import_module("pcdet")
            importlib.import_module("pcdet.datasets")
            mend_spconv()
        except ImportError as error:
            raise TaskError(
                f"OpenPCDet's package cannot be imported{f' from {self.folder}' if self.folder else ''}: {error}\n"
                f"What to do: install what is missing (pip install spconv numba easydict scikit-image "
                f"opencv-python-headless)\n\n{users_traceback(error)}"
            ) from error
        file = Path(str(pcdet.__file__)).resolve()
        if self.folder is not None and not file.is_relative_to(self.folder.resolve()):
            raise TaskError(
                f"pcdet has been imported from {file.parent}, and the config lies in the checkout {self.folder}. "
                "What to do: start from a process that has not imported another pcdet"
            )
        return pcdet


def _imported(folder: Path | None) -> Checkout:
    checkout = Checkout(folder)
    checkout.use()
    return checkout


def find_checkout(cfg_file: str | None) -> Checkout:
    """The checkout that a YAML lies in, else the installed pcdet.   TaskError if there is neither."""
    for folder in Path(cfg_file).resolve().parents if cfg_file else ():
        if (folder / PACKAGE).is_file():
            return Checkout(folder)
    if "pcdet" in sys.modules or importlib.util.find_spec("pcdet") is not None:
        return Checkout(None)
    raise TaskError(
        f"this config is trained by OpenPCDet's own code, and there is no pcdet: none of the folders above {cfg_file} "
        f"has a {PACKAGE}, and none is installed. What to do: give the YAML of a checkout of OpenPCDet (nothing of it "
        "needs to be built), or add its folder to PYTHONPATH; or say --task pointpillars, for MODEL.NAME PointPillar"
    )


def mend_spconv() -> None:
    """spconv on the CPU: its backward pass without a CUDA stream, and a bias in evaluation.

    Two of its functions look for a GPU whatever device the tensors are on. Nothing is done where it is not installed.
    """
    if importlib.util.find_spec("spconv") is None:
        return
    import torch

    ops: Any = importlib.import_module("spconv.pytorch.ops")
    if hasattr(ops.indice_conv, "mended") or torch.cuda.is_available():
        return
    convolve = ops.indice_conv

    def indice_conv(features: torch.Tensor, *args: Any, bias: torch.Tensor | None = None, **kwargs: Any) -> Any:
        out = convolve(features, *args, **kwargs)
        return out if bias is None else out.add_(bias)

    indice_conv.mended = True  # type: ignore[attr-defined]
    ops.get_current_stream = lambda: 0
    ops.indice_conv = indice_conv
