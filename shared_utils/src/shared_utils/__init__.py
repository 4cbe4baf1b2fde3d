"""Configuration, run logs, checkpoints, metrics and seeds shared by the vision projects.

Nothing here knows a model. Import its modules by name: `from shared_utils import checkpoint`.
"""

__version__ = "0.1.0"
