"""The file system: atomic writes, locks, the page cache, ``/proc``."""
