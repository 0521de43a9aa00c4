"""Lightning finds the strategies by name, whichever of the two packages is imported first."""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "lightning.pytorch.strategies"
"""The module in which Lightning looks a name up."""

_CLASSES = {"majority_vote": "MajorityVoteStrategy", "local_vote": "LocalVoteStrategy"}
"""A name, also of the module here that has the class."""


def register_when_imported() -> None:
    """Register the strategies now if Lightning is imported, else once it is; nothing is imported for it."""
    if _REGISTRY in sys.modules:
        register_all(sys.modules[_REGISTRY].StrategyRegistry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register_all(registry: Any) -> None:
    """Register every strategy; its module is imported when it is built."""
    for name, kind in _CLASSES.items():
        register(registry, name, partial(_build, name, kind))


def register(registry: Any, name: str, build: Callable[..., Any]) -> None:
    """Register a strategy with the variants that Lightning's DDP has.

    Args:
        registry: Lightning's.
        name: of the strategy.
        build: takes the variant's settings and returns the strategy.
    """
    for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
        for unused in (None, False, True):
            variant, settings = name + suffix, {"start_method": start_method}
            if unused is not None:
                variant += f"_find_unused_parameters_{str(unused).lower()}"
                settings["find_unused_parameters"] = unused  # type: ignore[assignment]
            description = f"one-bit majority vote, start_method={start_method!r}"
            registry.register(variant, build, description=description, override=True, **settings)


def _build(name: str, kind: str, **settings: Any) -> Any:
    return getattr(importlib.import_module(f".{name}", __package__), kind)(**settings)


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
        register_all(module.StrategyRegistry)
