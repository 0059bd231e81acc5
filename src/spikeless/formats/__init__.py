"""The bytes of TensorFlow and TensorFlow Serving, read and written without importing TensorFlow."""
