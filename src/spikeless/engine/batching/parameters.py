"""``BatchingParameters`` of a file in text format: read, checked, with defaults."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from spikeless.errors import InvalidArgument
from spikeless.formats.protos import message_class, read_text_proto

_log = logging.getLogger(__name__)

_Int64Value = message_class("Int64Value", value=(1, int))
_BoolValue = message_class("BoolValue", value=(1, bool))
_StringValue = message_class("StringValue", value=(1, str))
_BatchingParameters = message_class(
    "BatchingParameters",
    max_batch_size=(1, _Int64Value),
    batch_timeout_micros=(2, _Int64Value),
    max_enqueued_batches=(3, _Int64Value),
    num_batch_threads=(4, _Int64Value),
    thread_pool_name=(5, _StringValue),
    allowed_batch_sizes=(6, list[int]),
    pad_variable_length_inputs=(7, bool),
    enable_large_batch_splitting=(8, _BoolValue),
    max_execution_batch_size=(9, _Int64Value),
)


@dataclass(frozen=True)
class Parameters:
    """``BatchingParameters`` with TensorFlow Serving's defaults."""

    #: Rows that one call may have, and a batch, unless large calls are split.
    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    #: Batches that run at once.
    num_batch_threads: int = os.cpu_count() or 1
    #: Rows that a batch is padded to; empty: none is padded.
    allowed_batch_sizes: tuple[int, ...] = ()
    #: Whether inputs of other shapes are padded to the largest in their batch.
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool = False
    #: Rows that a batch may have where large calls are split.
    max_execution_batch_size: int = 1000

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Parameters:
        """Read a ``BatchingParameters`` in text format; raises as `read_text_proto`."""
        message = read_text_proto(file, _BatchingParameters())
        values: dict[str, Any] = {
            "allowed_batch_sizes": tuple(message.allowed_batch_sizes),
            "pad_variable_length_inputs": message.pad_variable_length_inputs,
        }
        for field, value in message.ListFields():
            # Batches have no thread pool that could bear the name.
            if field.message_type is not None and field.name != "thread_pool_name":
                values[field.name] = value.value
        values.setdefault("max_execution_batch_size", values.get("max_batch_size", cls.max_batch_size))
        return cls(**values)

    @property
    def limit(self) -> int:
        """Rows that one batch may have."""
        return self.max_execution_batch_size if self.enable_large_batch_splitting else self.max_batch_size

    def check_threads(self) -> None:
        """Refuse what no server could run with."""
        if self.num_batch_threads < 1:
            raise InvalidArgument(f"num_batch_threads must be positive; was {self.num_batch_threads}")

    def checked(self) -> Parameters:
        """The parameters that a version's queues get; refuses what makes no sense."""
        sizes = self.allowed_batch_sizes
        if sizes and sizes[-1] != self.max_batch_size:
            raise InvalidArgument(
                f"Last entry in allowed_batch_sizes must match max_batch_size; last entry was {sizes[-1]}; "
                f"expected {self.max_batch_size}"
            )
        if self.max_batch_size < 1:
            raise InvalidArgument(f"input_batch_size_limit must be positive; was {self.max_batch_size}")
        if self.batch_timeout_micros < 0:
            raise InvalidArgument(
                f"batch_timeout_micros must be non-negative; was {self.batch_timeout_micros}"
            )
        if self.max_enqueued_batches < self.enable_large_batch_splitting:
            raise InvalidArgument(f"max_enqueued_batches must be positive; was {self.max_enqueued_batches}")
        if self.limit > self.max_batch_size:
            raise InvalidArgument(
                "When enable_large_batch_splitting is true, input_batch_size_limit must be greater than or "
                f"equal to max_execution_batch_size: {self.max_batch_size} < {self.limit}"
            )
        if self.limit < 1:
            raise InvalidArgument(f"max_execution_batch_size must be positive; was {self.limit}")
        if list(sizes) != sorted(set(sizes)):
            _log.warning("allowed_batch_sizes should increase: of %s, some are never used", list(sizes))
        return self

    @property
    def used_batch_sizes(self) -> list[int]:
        """The allowed sizes that batches are padded to, lowest first."""
        return sorted({self.padded(size) for size in self.allowed_batch_sizes if 0 < size <= self.limit})

    def padded(self, size: int) -> int:
        """The rows that a batch of ``size`` rows runs with."""
        if not size:
            return 0  # no row to copy
        return next((allowed for allowed in self.allowed_batch_sizes if allowed >= size), size)
