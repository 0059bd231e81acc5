"""What tests share: the SavedModels of saved_models.py, as fixtures."""

pytest_plugins = ("saved_models",)
