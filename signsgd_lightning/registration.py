"""Lightning finds the strategies by name, whichever of the two packages is imported first."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "lightning.pytorch.strategies"
"""The module in which Lightning looks a name up."""

NAME = "majority_vote"


def register_when_imported() -> None:
    """Register the strategies now if Lightning is imported, else once it is; nothing is imported for it."""
    if _REGISTRY in sys.modules:
        register(sys.modules[_REGISTRY].StrategyRegistry, _build)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(registry: Any, build: Callable[..., Any]) -> None:
    """Register "majority_vote" with the variants that Lightning's DDP has.

    Args:
        registry: Lightning's.
        build: takes the variant's settings and returns the strategy.
    """
    for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
        for unused in (None, False, True):
            name, settings = NAME + suffix, {"start_method": start_method}
            if unused is not None:
                name += f"_find_unused_parameters_{str(unused).lower()}"
                settings["find_unused_parameters"] = unused  # type: ignore[assignment]
            description = f"one-bit majority vote over DDP, start_method={start_method!r}"
            registry.register(name, build, description=description, override=True, **settings)


def _build(**settings: Any) -> Any:
    from .strategy import MajorityVoteStrategy

    return MajorityVoteStrategy(**settings)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import of Lightning's registry go on as ever, and registers behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module.StrategyRegistry, _build)
