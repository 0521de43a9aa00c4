"""One vote: which ranks (topology), how bytes travel (transport), when (schedule), what is watched (observers)."""

from .failures import PeerLostError
from .observers import VoteStatistics
from .options import VoteOptions
from .verification import RanksDifferError
from .vote import StepInput, Vote

__all__ = ["PeerLostError", "RanksDifferError", "StepInput", "Vote", "VoteOptions", "VoteStatistics"]
