"""Runs under test leave no picture: drawing one takes as long as the rest of a run."""

from bnf_align.commands import check_run, train
from bnf_align.run import pictures


def leave_no_pictures() -> None:
    """In this process."""
    train.run_picture = lambda run_folder: run_folder / "run.png"
    check_run.save = lambda figure, path: path


def draw() -> None:
    train.run_picture = pictures.run_picture
    check_run.save = pictures.save
