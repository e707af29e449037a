"""Errors meant for the person at the keyboard: what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad usage or bad input. The CLI prints the message alone and exits with code 2."""


class TrainingStopped(Exception):
    """A run that cannot go on, such as a loss that is not finite. Exit code 1."""
