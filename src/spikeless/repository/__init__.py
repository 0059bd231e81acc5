"""The model repository: publishing through gates, the journal, ``models.config``."""
