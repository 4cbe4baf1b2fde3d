"""Configuration, run logs, checkpoints, metrics and seeds; nothing here knows a model."""

__version__ = "0.1.0"
