"""Batching: calls that wait for the same signature run together, as one call.

In: the calls of a session, and the ``BatchingParameters`` of
``--batching_parameters_file`` or of a version. Out: each call's own rows of the
answers. Rules, messages and metrics are those of TensorFlow Serving's
``batching_session.cc`` and of ``shared_batch_scheduler.h``:

- Calls with the same input and output tensors share a queue. Its last batch is open: it
  takes calls until it is full.
- A batch may run when it is full or as old as ``batch_timeout_micros``, and when one of
  the ``num_batch_threads`` places is free. Queues with such batches take turns.
- It is padded with copies of a row up to the next of ``allowed_batch_sizes``.

There are no threads of its own: a batch runs on the thread of one of its calls, while
the others sleep until it has their rows, so a call that is alone is never handed over.
Inputs are copied once, from the requests into the tensor of the batch, and the answers
are views of its outputs.
"""

from __future__ import annotations

from spikeless.engine.batching.parameters import Parameters
from spikeless.engine.batching.runner import BatchObserver
from spikeless.engine.batching.sessions import Batching, warming

__all__ = ["BatchObserver", "Batching", "Parameters", "warming"]
