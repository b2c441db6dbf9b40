"""pcdet's source as this machine can run it, changed while it is imported and nowhere else.

`.cuda()` and `torch.cuda` mean the worker's device, names that numpy has removed mean what they were, and what pcdet
imports but is not there has a stand-in: its compiled operations, and packages that only some of its models use.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

import torch

OURS = "raytrain.tasks.openpcdet"
OPS = {
    f"pcdet.ops.{path}": f"{OURS}.ops.{path.rpartition('.')[2]}"
    for path in (
        "iou3d_nms.iou3d_nms_cuda",
        "roiaware_pool3d.roiaware_pool3d_cuda",
        "roipoint_pool3d.roipoint_pool3d_cuda",
        "pointnet2.pointnet2_batch.pointnet2_batch_cuda",
        "pointnet2.pointnet2_stack.pointnet2_stack_cuda",
        "bev_pool.bev_pool_ext",
        "ingroup_inds.ingroup_inds_cuda",
    )
}
WHERE_ABSENT = {**OPS, "torch_scatter": f"{OURS}.ops.torch_scatter", "pcdet.version": f"{OURS}.version"}
# CUDA by numba, which nothing but a GPU runs; always ours, so that one evaluation is the same everywhere.
ALWAYS = {
    "pcdet.datasets.kitti.kitti_object_eval_python.eval": f"{OURS}.kitti_eval",
    "pcdet.datasets.kitti.kitti_object_eval_python.rotate_iou": f"{OURS}.rotate_iou",
    "pcdet.datasets.once.once_eval.iou_utils": f"{OURS}.rotate_iou",
}
OPTIONAL = ("torchvision", "SharedArray")  # imported at the top of modules that most configs need nothing of
# Modules of which pcdet imports all and a config uses one: what one of them lacks is no matter until it is used.
DATASET = re.compile(r"pcdet\.datasets\.\w+\.\w+_dataset")
REMOVED = {"int": "int", "float": "float", "bool": "bool", "object": "object", "str": "str", "complex": "complex"}
TO_WORKER, CUDA = "__raytrain_to_worker__", "__raytrain_cuda__"


class Cuda:
    """torch.cuda as a worker's device has it.

    device: where `.cuda()` goes; the CPU until a task says otherwise
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        if self.device.type == "cpu":
            if name.endswith("Tensor"):
                return getattr(torch, name)
            if name in ("synchronize", "empty_cache"):
                return lambda *_: None
            if name == "current_device":
                return lambda: self.device
        return getattr(torch.cuda, name)

    def to_worker(self, thing: Any, *args: Any, **kwargs: Any) -> Any:
        """A tensor or module on the worker's device."""
        return thing.to(self.device)


class _Adapted(ast.NodeTransformer):
    """`np.int` -> `int`, `x.cuda()` -> to_worker(x), `torch.cuda` -> the worker's."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name):
            if node.value.id in ("np", "numpy") and node.attr in REMOVED:
                return ast.copy_location(ast.Name(REMOVED[node.attr], ast.Load()), node)
            if node.value.id == "torch" and node.attr == "cuda":
                return ast.copy_location(ast.Name(CUDA, ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            called = ast.copy_location(ast.Name(TO_WORKER, ast.Load()), node)
            return ast.copy_location(ast.Call(called, [node.func.value, *node.args], node.keywords), node)
        return node


class _SourceLoader(SourceFileLoader):
    """Compiles the source anew, adapted; what Python caches of it stays as it is."""

    cuda: Cuda

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = _Adapted().visit(ast.parse(self.get_data(path), path))
        return self.source_to_code(ast.fix_missing_locations(tree), path)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update({TO_WORKER: self.cuda.to_worker, CUDA: self.cuda})
        try:
            super().exec_module(module)
        except Exception as error:
            if not DATASET.fullmatch(module.__name__):
                raise
            _Missing(f"cannot be imported: {type(error).__name__}: {error}").exec_module(module)


class _StandIn(Loader):
    """A module that has all that one of ours has."""

    def __init__(self, ours: str) -> None:
        self.ours = ours

    def exec_module(self, module: ModuleType) -> None:
        ours = importlib.import_module(self.ours)
        vars(module).update({name: value for name, value in vars(ours).items() if not name.startswith("__")})
        if hasattr(ours, "__version__"):
            module.__version__ = ours.__version__  # type: ignore[attr-defined]


class _Missing(Loader):
    """A module that is not there; what is taken from it fails, and says why, when it is used."""

    def __init__(self, why: str) -> None:
        self.why = why

    def exec_module(self, module: ModuleType) -> None:
        def take(name: str) -> _Absent:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Absent(f"{module.__name__}.{name}", self.why)

        module.__getattr__ = take  # type: ignore[method-assign]


class _Absent:
    """Something of a module that is not there."""

    def __init__(self, name: str, why: str) -> None:
        self._name, self._why = name, why

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{self._name} {self._why}")

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}", self._why)


class PcdetFinder(MetaPathFinder):
    """First in sys.meta_path, from the first use of pcdet on; finds nothing but what pcdet needs."""

    def __init__(self) -> None:
        self.cuda = Cuda()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in ALWAYS:
            return ModuleSpec(fullname, _StandIn(ALWAYS[fullname]))
        package = fullname.partition(".")[0]
        if package not in ("pcdet", *OPTIONAL) and fullname not in WHERE_ABSENT:
            return None
        spec = self._theirs(fullname, path)
        if spec is not None and isinstance(spec.loader, ExtensionFileLoader) and not torch.cuda.is_available():
            spec = None  # an extension that ends the process where a tensor is not on a GPU
        if spec is None:
            if fullname in WHERE_ABSENT:
                return ModuleSpec(fullname, _StandIn(WHERE_ABSENT[fullname]))
            why = f"is needed, and {package} is not installed: pip install {package}"
            return ModuleSpec(fullname, _Missing(why), is_package=True) if package in OPTIONAL else None
        if package == "pcdet" and type(spec.loader) is SourceFileLoader:
            adapted = _SourceLoader(fullname, spec.loader.path)
            adapted.cuda = self.cuda
            spec.loader = adapted
        return spec

    def _theirs(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if isinstance(finder, PcdetFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path)
            if spec is not None:
                return spec
        return None


def finder() -> PcdetFinder:
    """The one in sys.meta_path, put there if there is none."""
    for each in sys.meta_path:
        if isinstance(each, PcdetFinder):
            return each
    first = PcdetFinder()
    sys.meta_path.insert(0, first)
    return first
