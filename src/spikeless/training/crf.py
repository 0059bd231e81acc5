"""Linear-chain conditional random fields: what tf2crf uses of tensorflow-addons.

`prepare` makes ``import tf2crf`` work on the installed TensorFlow, with Keras 2
(``tf_keras``) and without tensorflow-addons, whose last release has no wheels after
Python 3.11 and asks for TensorFlow 2.15.

    from spikeless.training import crf
    crf.prepare()  # before tf.keras is used
    import tensorflow as tf
    import tf2crf

A CRF scores a sequence by its tags, ``sum(potentials[t, tag[t]])``, and by which tag
follows which, ``sum(transitions[tag[t - 1], tag[t]])``. The likelihood of a sequence is
``exp(score)`` divided by the sum over all sequences (Lafferty et al., Conditional
Random Fields, 2001). Both functions take batches that are padded at the end and one
time step or longer. They have gradients, and run in a ``tf.function`` and a SavedModel.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any

from spikeless.errors import FailedPrecondition

__all__ = ["crf_decode", "crf_log_likelihood", "prepare"]


def prepare() -> None:
    """Make ``import tf2crf`` work: Keras 2 as ``tf.keras``, this module for addons.

    Raises:
        FailedPrecondition: tf2crf is missing, or ``tf.keras`` was used with Keras 3.
        ModuleNotFoundError: ``tf_keras`` is missing; it is in the extra ``tagger``.
    """
    # TensorFlow reads it when `tf.keras` is first used.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow as tf
    import tf_keras

    if tf.keras.Model is not tf_keras.Model:
        raise FailedPrecondition(
            "tf2crf needs Keras 2, but tf.keras was used with Keras 3 before: call "
            "spikeless.training.crf.prepare() first, or set TF_USE_LEGACY_KERAS=1"
        )
    if importlib.util.find_spec("tf2crf") is None:
        raise FailedPrecondition(
            "tf2crf is not installed: run `pip install --no-deps tf2crf==0.1.33`; the tensorflow-addons "
            "that it asks for is not needed"
        )
    # tf2crf uses tensorflow_addons.text.crf_decode and
    # tensorflow_addons.text.crf.crf_log_likelihood.
    parent: Any = None
    for name in ("tensorflow_addons", "tensorflow_addons.text", "tensorflow_addons.text.crf"):
        module: Any = types.ModuleType(name, f"Stands in for {name}: see {__name__}")
        module.__path__ = []
        module.crf_decode, module.crf_log_likelihood = crf_decode, crf_log_likelihood
        if parent is not None:
            setattr(parent, name.rpartition(".")[2], module)
        sys.modules[name] = parent = module


def crf_decode(potentials: Any, transition_params: Any, sequence_length: Any) -> tuple[Any, Any]:
    """The most likely sequences of tags (Viterbi).

    Of equally likely ones, that with the lowest tags, compared from the end.

    Args:
        potentials: scores of tags [batch, length, tags].
        transition_params: scores of one tag (first axis) before another [tags, tags].
        sequence_length: true lengths [batch].

    Returns:
        Tags [batch, length], int32, 0 after the end; scores of the sequences [batch],
        0 where the length is 0.
    """
    import tensorflow as tf

    potentials, transitions, lengths, steps, live = _inputs(potentials, transition_params, sequence_length)
    batch, tags = tf.shape(potentials)[1], tf.shape(potentials)[2]
    itself = tf.tile(tf.range(tags)[None, :], [batch, 1])
    pointers = tf.TensorArray(tf.int32, steps, element_shape=[None, transitions.shape[0]])
    pointers = pointers.write(0, itself)

    def forward(step: Any, scores: Any, pointers: Any) -> tuple[Any, Any, Any]:
        through = scores[:, :, None] + transitions[None]
        best = potentials[step] + tf.reduce_max(through, axis=1)
        origin = tf.argmax(through, axis=1, output_type=tf.int32)
        going_on = live[step][:, None]
        pointers = pointers.write(step, tf.where(going_on, origin, itself))
        return step + 1, tf.where(going_on, best, scores), pointers

    first = tf.ensure_shape(potentials[0], [None, transitions.shape[0]])
    _, scores, pointers = tf.while_loop(
        lambda step, *_: step < steps, forward, (tf.constant(1), first, pointers), maximum_iterations=steps
    )
    pointers = pointers.stack()
    last = tf.argmax(scores, axis=1, output_type=tf.int32)
    found = tf.TensorArray(tf.int32, steps, element_shape=[None]).write(steps - 1, last)

    def backward(step: Any, tag: Any, found: Any) -> tuple[Any, Any, Any]:
        tag = tf.gather(pointers[step], tag, batch_dims=1)
        return step - 1, tag, found.write(step - 1, tag)

    _, _, found = tf.while_loop(
        lambda step, *_: step > 0, backward, (steps - 1, last, found), maximum_iterations=steps
    )
    decoded = tf.where(live, found.stack(), 0)
    best = tf.reduce_max(scores, axis=1)
    return tf.transpose(decoded), tf.where(lengths > 0, best, tf.zeros_like(best))


def crf_log_likelihood(
    inputs: Any, tag_indices: Any, sequence_lengths: Any, transition_params: Any
) -> tuple[Any, Any]:
    """The logarithm of the likelihood of sequences of tags.

    Args:
        inputs: scores of tags [batch, length, tags].
        tag_indices: the tags [batch, length].
        sequence_lengths: true lengths [batch].
        transition_params: scores of one tag (first axis) before another [tags, tags].

    Returns:
        Log-likelihoods [batch], 0 where the length is 0; ``transition_params`` in the
        type of ``inputs``.
    """
    import tensorflow as tf

    inputs, transitions, lengths, steps, live = _inputs(inputs, transition_params, sequence_lengths)
    tag_indices = tf.transpose(tf.cast(tag_indices, tf.int32))
    weights = tf.cast(live, inputs.dtype)
    of_tags = tf.reduce_sum(tf.gather(inputs, tag_indices, batch_dims=2) * weights, axis=0)
    pairs = tf.stack([tag_indices[:-1], tag_indices[1:]], axis=-1)
    of_pairs = tf.reduce_sum(tf.gather_nd(transitions, pairs) * weights[1:], axis=0)

    def forward(step: Any, scores: Any) -> tuple[Any, Any]:
        """Logarithms of the summed likelihoods of all paths to each tag."""
        through = scores[:, :, None] + transitions[None]
        summed = inputs[step] + tf.reduce_logsumexp(through, axis=1)
        return step + 1, tf.where(live[step][:, None], summed, scores)

    first = tf.ensure_shape(inputs[0], [None, transitions.shape[0]])
    _, scores = tf.while_loop(
        lambda step, *_: step < steps, forward, (tf.constant(1), first), maximum_iterations=steps
    )
    found = of_tags + of_pairs - tf.reduce_logsumexp(scores, axis=1)
    return tf.where(lengths > 0, found, tf.zeros_like(found)), transitions


def _inputs(potentials: Any, transitions: Any, lengths: Any) -> tuple[Any, Any, Any, Any, Any]:
    """What both functions start with, time first.

    Returns:
        Potentials [length, batch, tags]; transitions in their type; lengths [batch];
        the number of time steps; which steps are in a sequence [length, batch].
    """
    import tensorflow as tf

    potentials = tf.transpose(tf.convert_to_tensor(potentials), [1, 0, 2])
    transitions = tf.cast(transitions, potentials.dtype)
    lengths = tf.cast(lengths, tf.int32)
    steps = tf.shape(potentials)[0]
    return potentials, transitions, lengths, steps, tf.transpose(tf.sequence_mask(lengths, steps))
