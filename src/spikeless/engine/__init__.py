"""The embedded engine, a TensorFlow-Serving-compatible server; only `spikeless serve` imports it."""
