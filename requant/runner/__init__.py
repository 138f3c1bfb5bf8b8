"""Runs DeepSeek-family checkpoints, whatever format their weights are stored in."""
