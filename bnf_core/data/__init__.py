"""Rows of feedback: read, checked, and turned into tokens."""
