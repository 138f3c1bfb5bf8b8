"""Recipes as data: one TOML file a preset, read by `requant.convert.recipe`."""
