"""signSGD with majority vote for PyTorch and Lightning; importing it registers ``strategy="majority_vote"``."""

from .callbacks import VoteMonitor
from .checkpoint import gather_state, scatter_state
from .ddp import enable_majority_vote
from .exchange import Exchange
from .geometry import GeometryMonitor
from .optimizer import Signum
from .peers import PeerLostError
from .statistics import VoteStatistics
from .strategy import MajorityVoteStrategy
from .verify import RanksDifferError

__all__ = [
    "Exchange",
    "GeometryMonitor",
    "MajorityVoteStrategy",
    "PeerLostError",
    "RanksDifferError",
    "Signum",
    "VoteMonitor",
    "VoteStatistics",
    "enable_majority_vote",
    "gather_state",
    "scatter_state",
]
