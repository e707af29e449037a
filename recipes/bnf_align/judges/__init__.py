"""Judges: what says how good a completion is.

A judge is a function of the prompt (text or messages), the completion (text) and the row that the prompt stands in; it
returns true or false, a number, or None for no opinion.
"""
