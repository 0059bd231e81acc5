"""The load generator: open-loop requests, and the floor of its own latency."""
