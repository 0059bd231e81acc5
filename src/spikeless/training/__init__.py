"""For training scripts: what they read (`dataset`) and what they write (`export`)."""
