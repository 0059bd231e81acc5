"""The model repository that servers mount: publishing through gates, the journal, ``models.config``."""
