"""The file system: what appears whole or not at all, locks between processes, pages in memory."""
