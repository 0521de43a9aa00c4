"""The Lightning strategies, and how Lightning finds them by name."""
