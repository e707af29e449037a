"""Choosing a device."""

import pytest

from bnf_core.devices import choose_device
from bnf_core.errors import UserError


@pytest.mark.parametrize(("device", "chosen"), [("auto", "gpu"), ("gpu", "gpu"), ("cpu", "cpu")])
def test_auto_is_the_best_that_is_present(device: str, chosen: str) -> None:
    assert choose_device(device, ["gpu", "cpu"], "MLX") == chosen


def test_what_is_not_present_is_refused_with_what_is() -> None:
    with pytest.raises(UserError, match=r"device 'cuda' is not present: MLX offers gpu, cpu"):
        choose_device("cuda", ["gpu", "cpu"], "MLX")
