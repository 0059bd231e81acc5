"""Fixtures that several test files share."""

pytest_plugins = ("saved_models", "trained_models", "promotion_models")
