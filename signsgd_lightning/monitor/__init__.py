"""Lightning callbacks that watch: what votes look like, and whether signs suit the model."""
