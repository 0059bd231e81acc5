"""Several processes that serve behind the same ports, and the one that leads them."""
