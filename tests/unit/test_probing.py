"""What the probes of a model's code compare, and by which measure."""

import numpy as np
import pytest

from bnf_core.steps.probing import Probe, heeds_layout, packing_probe, sharing_probe

RNG = np.random.default_rng(0)
ALONE = RNG.normal(size=(20, 8)).astype(np.float32)
NOISE = RNG.normal(size=ALONE.shape).astype(np.float32)


@pytest.mark.parametrize(("half", "round_off"), [(False, 1e-6), (True, 1e-2)])
def test_round_off_is_no_leak(half: bool, round_off: float) -> None:
    assert heeds_layout(ALONE, ALONE + NOISE, ALONE + round_off * NOISE, half=half)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("leak", [1.0, 1e-3, 1e-5, 0.0])
def test_a_model_that_ignores_the_layout_is_refused_however_small_its_leak(half: bool, leak: float) -> None:
    ignored = ALONE + np.float32(leak) * NOISE
    assert heeds_layout(ALONE, ignored, ignored, half=half) == (leak == 0.0)  # with no leak there is nothing to heed


@pytest.mark.parametrize(("half", "error"), [(False, 1e-3), (True, 0.2), (False, np.nan)])
def test_an_error_beyond_round_off_is_refused(half: bool, error: float) -> None:
    assert not heeds_layout(ALONE, ALONE + 10 * NOISE, ALONE + np.float32(error) * NOISE, half=half)


@pytest.mark.parametrize("probe", [packing_probe(), sharing_probe()])
def test_both_layouts_of_a_probe_score_the_same_tokens(probe: Probe) -> None:
    assert np.array_equal(probe.alone.targets, probe.together.targets)
    assert np.array_equal(probe.alone.sequence_ids, probe.together.sequence_ids)
    assert probe.together.packed or probe.together.shared
    assert not probe.alone.packed and not probe.alone.shared
