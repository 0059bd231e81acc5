"""TensorFlow's C runtime (`session`), and a model that answers requests (`model`)."""

from spikeless.runtime.session import CALLING_THREAD, Session, op_names, return_free_memory, version

__all__ = ["CALLING_THREAD", "Session", "op_names", "return_free_memory", "version"]
