"""The version, read by the build as well (no import of torch here)."""

__version__ = "0.1.0"
