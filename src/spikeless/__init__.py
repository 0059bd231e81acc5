"""Spikeless: swap a TensorFlow Serving model under live traffic without anyone noticing."""

__version__ = "0.1.0"
