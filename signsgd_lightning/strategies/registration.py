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

_REGISTRIES = {
    "lightning.pytorch.strategies": (
        "StrategyRegistry",
        {
            "majority_vote": ("majority_vote", "MajorityVoteStrategy"),
            "local_vote": ("local_vote", "LocalVoteStrategy"),
            "elastic_vote": ("elastic_vote", "ElasticVoteStrategy"),
            "majority_vote_sharded": ("sharded", "ShardedMajorityVoteStrategy"),
        },
    ),
    "lightning.fabric.strategies": (
        "STRATEGY_REGISTRY",
        {
            "majority_vote": ("fabric", "FabricMajorityVoteStrategy"),
            "local_vote": ("fabric", "FabricLocalVoteStrategy"),
        },
    ),
}
"""The modules in which the Trainer and Fabric look a name up, each with its registry: name -> module here, class."""

_ALONE = ("elastic_vote", "majority_vote_sharded")
"""Names without the variants of DDP: the one starts no processes, the other starts scripts alone."""


def register_when_imported() -> None:
    """Register the strategies now if Lightning is imported, else once it is; nothing is imported for it."""
    for module in _REGISTRIES:
        if module in sys.modules:
            register_all(sys.modules[module])
        elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(module))


def register_all(module: ModuleType) -> None:
    """Register every strategy in a module's registry; its own module is imported when it is built."""
    registry, classes = _REGISTRIES[module.__name__]
    for name, (home, kind) in classes.items():
        register(getattr(module, registry), name, partial(_build, home, kind), alone=name in _ALONE)


def register(registry: Any, name: str, build: Callable[..., Any], alone: bool = False) -> None:
    """Register a strategy, with the variants that Lightning's DDP has unless it is alone.

    Args:
        registry: Lightning's.
        name: of the strategy.
        build: takes the variant's settings and returns the strategy.
        alone: whether it has no variants.
    """
    if alone:
        registry.register(name, build, description="one-bit majority vote", override=True)
        return
    for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
        for unused in (None, False, True):
            variant, settings = name + suffix, {"start_method": start_method}
            if unused is not None:
                variant += f"_find_unused_parameters_{str(unused).lower()}"
                settings["find_unused_parameters"] = unused  # type: ignore[assignment]
            description = f"one-bit majority vote, start_method={start_method!r}"
            registry.register(variant, build, description=description, override=True, **settings)


def _build(home: str, kind: str, **settings: Any) -> Any:
    return getattr(importlib.import_module(f".{home}", __package__), kind)(**settings)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import of one of Lightning's registries go on as ever, and registers behind it."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
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
        register_all(module)
