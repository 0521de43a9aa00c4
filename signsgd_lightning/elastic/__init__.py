"""Workers that come and go: a vote of whoever is there, by torchft."""

from .batches import ElasticBatches
from .enable import ElasticVote, enable_elastic_vote

__all__ = ["ElasticBatches", "ElasticVote", "enable_elastic_vote"]
