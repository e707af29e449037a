"""Errors meant for the person at the keyboard: what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad usage or bad input. The CLI prints the message alone and exits with code 2."""


class Failed(Exception):
    """Nobody's mistake here, such as a server that does not answer. Exit code 1."""


class TrainingStopped(Failed):
    """A run that cannot go on, such as a loss that is not finite."""
