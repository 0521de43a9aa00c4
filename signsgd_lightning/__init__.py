"""One-bit majority votes for PyTorch and Lightning, which finds ``strategy="majority_vote"`` and ``"local_vote"``.

Importing it is enough for that. Lightning itself is imported when a strategy or a callback is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoint.gathered import gather_state, scatter_state
from .enable import enable_majority_vote
from .groups import signmuon_groups
from .local_steps import LocalSteps, enable_local_steps
from .optimizer import Signum
from .strategies.registration import register_when_imported
from .vote import PeerLostError, RanksDifferError
from .worker_states import WorkerStates

if TYPE_CHECKING:
    from .elastic import ElasticBatches, ElasticLocalSteps, ElasticVote, enable_elastic_local_steps, enable_elastic_vote
    from .huggingface import MajorityVoteCallback
    from .monitor.geometry_monitor import GeometryMonitor
    from .monitor.vote_monitor import VoteMonitor
    from .strategies.elastic_vote import ElasticVoteStrategy
    from .strategies.fabric import FabricLocalVoteStrategy, FabricMajorityVoteStrategy
    from .strategies.local_vote import LocalVoteStrategy
    from .strategies.majority_vote import MajorityVoteStrategy
    from .strategies.sharded import ShardedMajorityVoteStrategy

__all__ = [
    "ElasticBatches",
    "ElasticLocalSteps",
    "ElasticVote",
    "ElasticVoteStrategy",
    "FabricLocalVoteStrategy",
    "FabricMajorityVoteStrategy",
    "GeometryMonitor",
    "LocalSteps",
    "LocalVoteStrategy",
    "MajorityVoteCallback",
    "MajorityVoteStrategy",
    "PeerLostError",
    "RanksDifferError",
    "ShardedMajorityVoteStrategy",
    "Signum",
    "VoteMonitor",
    "WorkerStates",
    "enable_elastic_local_steps",
    "enable_elastic_vote",
    "enable_local_steps",
    "enable_majority_vote",
    "gather_state",
    "scatter_state",
    "signmuon_groups",
]

_HOMES = {
    "ElasticBatches": "elastic",
    "ElasticLocalSteps": "elastic",
    "ElasticVote": "elastic",
    "ElasticVoteStrategy": "strategies.elastic_vote",
    "FabricLocalVoteStrategy": "strategies.fabric",
    "FabricMajorityVoteStrategy": "strategies.fabric",
    "GeometryMonitor": "monitor.geometry_monitor",
    "LocalVoteStrategy": "strategies.local_vote",
    "MajorityVoteCallback": "huggingface",
    "MajorityVoteStrategy": "strategies.majority_vote",
    "ShardedMajorityVoteStrategy": "strategies.sharded",
    "VoteMonitor": "monitor.vote_monitor",
    "enable_elastic_local_steps": "elastic",
    "enable_elastic_vote": "elastic",
}
"""What needs Lightning, transformers or torchft."""

_EXTRAS = {
    "lightning": ("Lightning", "lightning"),
    "torchft": ("torchft", "elastic"),
    "transformers": ("transformers", "huggingface"),
}
"""Package -> what it is called, and the extra that brings it."""

register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        called, extra = _EXTRAS.get((error.name or "").partition(".")[0], ("", ""))
        if not called:
            raise
        raise ImportError(f"{name} needs {called}: pip install 'signsgd[{extra}]'") from error
