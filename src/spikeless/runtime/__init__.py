"""TensorFlow's C runtime through ctypes (`session`), and a SavedModel that answers requests (`model`)."""

from spikeless.runtime.session import CALLING_THREAD, Session, return_free_memory, version

__all__ = ["CALLING_THREAD", "Session", "return_free_memory", "version"]
