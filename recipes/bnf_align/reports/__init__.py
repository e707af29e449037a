"""Runs and experiments as one HTML page."""
