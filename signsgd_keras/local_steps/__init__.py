"""Local steps for Keras: when rounds close (local_vote), how one does (rounds), by which messages (exchange)."""
