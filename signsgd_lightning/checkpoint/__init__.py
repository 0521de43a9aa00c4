"""The state of every worker on disk: in one file, or in a directory of shards, whole whenever the run is killed."""
