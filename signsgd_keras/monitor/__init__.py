"""Keras callbacks that watch: what votes look like, whether replicas are the same, and whether signs suit the model."""
