"""The version of the distribution; apart, so that packaging can read it without importing torch."""

__version__ = "1.0.0"
