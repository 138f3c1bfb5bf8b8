"""Checkpoints on disk: read, plan, write. Knows files, not what is inside a format."""
