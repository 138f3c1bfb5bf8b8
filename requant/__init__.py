"""requant: turn a published checkpoint into the artifact that runs on your hardware."""

__version__ = "0.1.0"
