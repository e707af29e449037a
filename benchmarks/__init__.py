"""Measured side by side: the loss, a whole step, and how both grow, beside other trainers."""
