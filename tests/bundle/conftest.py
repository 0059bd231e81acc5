"""Fixtures of the tests that run containers."""

from container_stack import clone, containers, images, stack

__all__ = ["clone", "containers", "images", "stack"]
