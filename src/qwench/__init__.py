"""Qwench turns a Qwen3.5-family checkpoint into a release that people run."""

__version__ = "0.1.0"
__all__ = ["__version__"]
