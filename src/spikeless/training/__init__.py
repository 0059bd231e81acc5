"""For training scripts: what they read (`dataset`) and what they leave behind (`export`)."""
