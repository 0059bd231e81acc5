"""The formats of TensorFlow and TensorFlow Serving, without importing TensorFlow."""
