"""Runs source and output side by side and judges the difference."""
