"""One vote: among which replicas, how bytes travel (transport), what workers share (agreement), what is watched."""

from .cross_device_ops import MajorityVote
from .observers import Observer, VoteStatistics
from .verification import ReplicasDifferError
from .vote import Vote, vote_among

__all__ = ["MajorityVote", "Observer", "ReplicasDifferError", "Vote", "VoteStatistics", "vote_among"]
