"""Bring proven models to a tracking server."""
