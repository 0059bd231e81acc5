"""Processes beside a server: they keep memory, export states, record calls."""
