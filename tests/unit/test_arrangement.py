"""How accelerate's settings arrange the processes of a run, and what of them is refused."""

import pytest

pytest.importorskip("torch")

from bnf_core.errors import UserError
from bnf_torch.processes import Arrangement, _arrangement


def arranged(monkeypatch: pytest.MonkeyPatch, count: int, fsdp: bool = True, **sizes: int) -> Arrangement:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp).lower())
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", str(size))
    return _arrangement(count)


def test_sizes_that_go_with_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _arrangement(4) == Arrangement(1, 1), "without a parallelism_config"
    assert arranged(monkeypatch, 4, dp_replicate=2, dp_shard=2) == Arrangement(2, 1)
    assert arranged(monkeypatch, 4, dp_replicate=1, dp_shard=2, tp=2) == Arrangement(1, 2)
    assert arranged(monkeypatch, 2, fsdp=False, dp_replicate=1, dp_shard=1, tp=2) == Arrangement(1, 2)


@pytest.mark.parametrize(
    ("sizes", "fsdp", "said"),
    [
        (
            {"dp_replicate": 2, "dp_shard": 3},
            True,
            "2 × dp_shard_size 3 × tp_size 1 is 6, and this run has 4 processes",
        ),
        ({"tp": 3}, True, "tp_size 3 is 3, and this run has 4 processes"),
        ({"dp_shard": 4}, False, "dp_shard_size 4 needs FSDP2"),
        ({"dp_replicate": 2, "tp": 2}, True, "tp_size 2 with dp_replicate_size 2: expected dp_shard_size instead"),
        ({"cp": 2, "dp_shard": 2}, True, "parallelism_config_cp_size: 2 is not supported"),
        ({"sp": 4}, True, "parallelism_config_sp_size: 4 is not supported"),
    ],
)
def test_others_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], fsdp: bool, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        arranged(monkeypatch, 4, fsdp, **sizes)
