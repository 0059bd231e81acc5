"""Processes that stand beside a server: what it has in memory, what it serves, what it is asked."""
