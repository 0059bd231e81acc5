"""The embedded engine: a server like TensorFlow Serving, for `spikeless serve`."""
