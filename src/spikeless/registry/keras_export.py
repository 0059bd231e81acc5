"""``python -m spikeless.registry.keras_export FILE FOLDER``: export a Keras model.

In: a ``.keras`` file. Out: a SavedModel with the signatures ``serving_default`` and
``serve``. It is a process of its own: it may crash without harm, and TensorFlow's
memory is free again afterwards.
"""

from __future__ import annotations

import sys


def main() -> None:
    file, folder = sys.argv[1:]
    import keras

    # In safe mode, code that is stored in the file is refused.
    model = keras.saving.load_model(file, compile=False, safe_mode=True)
    model.export(folder, format="tf_saved_model", verbose=False)


if __name__ == "__main__":
    main()
