"""The load generator: one open-loop schedule on a small HTTP/2 client, and its own latency's floor."""
