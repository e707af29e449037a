"""Which device computes: every backend chooses by the same rule, and then makes it a device of its own kind."""

from collections.abc import Sequence

from bnf_core.errors import UserError


def choose_device(device: str, present: Sequence[str], framework: str) -> str:
    """One of the devices that are present; `auto` is the best there is.

    Args:
        device: as the settings name it.
        present: best first.
        framework: whose devices these are, for messages.
    Raises:
        UserError: the device is not present.
    """
    chosen = present[0] if device == "auto" else device
    if chosen not in present:
        raise UserError(f"device {chosen!r} is not present: {framework} offers {', '.join(present)}")
    return chosen


def require_cpu(device: str) -> None:
    """
    Raises:
        UserError: a run that is to be deterministic is on another device.
    """
    if device != "cpu":
        raise UserError(
            f"deterministic is true, which is kept on the CPU alone: this run is on {device}. Set device to cpu, "
            "or deterministic to false"
        )
