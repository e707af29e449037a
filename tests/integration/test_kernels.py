"""The fused loss with a bias and a soft cap, in blocks and chunks of every kind, held against the oracle; PyTorch's
once more as on CUDA, its Triton kernel run by Triton's interpreter."""

import os
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forked
from bnf_conformance import checks, vectors
from bnf_conformance.checks import Subject
from bnf_conformance.tolerances import Tolerances
from bnf_core import oracle, registry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
needs_mlx = pytest.mark.skipif(find_spec("mlx") is None, reason="mlx is not installed")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
on_both = pytest.mark.parametrize(
    "backend", [pytest.param("torch", marks=needs_torch), pytest.param("mlx", marks=needs_mlx)]
)
on_cuda = pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter")
long_interpreted = [pytest.mark.slow] if INTERPRETED else []  # which takes seconds for what a CPU does in milliseconds

Arrays = dict[str, np.ndarray]


def drawn(n: int = 21, vocab: int = 150, dim: int = 8, *, scale: float = 1.0, bias: bool = False) -> Arrays:
    """Values of at most 8 bits, so that every dtype holds them; half of the observed tokens are the likeliest."""
    rng = np.random.default_rng(n * vocab)
    inputs = {
        "hidden": vectors.rounded(rng.normal(size=(n, dim)) * scale, "bfloat16"),
        "head_weight": vectors.rounded(rng.normal(size=(vocab, dim)), "bfloat16"),
        "bias": vectors.rounded(rng.normal(size=vocab) * 2, "bfloat16") if bias else np.zeros(vocab),
        "targets": rng.integers(0, vocab, n),
        "coefficients": rng.choice([-1.0, 1.0], n) / n,
    }
    inputs["targets"][::2] = (inputs["hidden"] @ inputs["head_weight"].T + inputs["bias"]).argmax(1)[::2]
    inputs["targets"][-3:] = 0, vocab // 2, vocab - 1
    return with_reference({k: v if k == "targets" else v.astype(np.float32) for k, v in inputs.items()}, None)


def with_reference(inputs: Arrays, soft_cap: float | None) -> Arrays:
    """References on both sides of the policy."""
    o = oracle.log_odds(logits_of(inputs, soft_cap)[0], inputs["targets"])
    near = np.clip(o, -200, 200) + np.tile([-1.0, 0.5, 2.0], len(o))[: len(o)]
    return inputs | {"ref_log_odds": near.astype(np.float32)}


def logits_of(inputs: Arrays, soft_cap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, V) in float64 and the derivative of the soft cap."""
    z = inputs["hidden"].astype(np.float64) @ inputs["head_weight"].astype(np.float64).T + inputs["bias"]
    if soft_cap is None:
        return z, np.ones_like(z)
    return soft_cap * np.tanh(z / soft_cap), 1 / np.cosh(np.clip(z / soft_cap, -300, 300)) ** 2


def expected_of(inputs: Arrays, soft_cap: float | None) -> Arrays:
    """The oracle on dense float64 logits, and the chain rule by hand."""
    (logits, slope), y, c = logits_of(inputs, soft_cap), inputs["targets"], inputs["coefficients"].astype(np.float64)
    loss, grad = oracle.token_loss(logits, y, inputs["ref_log_odds"])
    grad = grad * c[:, None] * slope
    return {
        "loss": np.asarray(c @ loss),
        "log_odds": oracle.log_odds(logits, y),
        "other_entropy": oracle.other_entropy(logits, y),
        "token_loss": loss,
        "grad_hidden": grad @ inputs["head_weight"].astype(np.float64),
        "grad_head": grad.T @ inputs["hidden"].astype(np.float64),
        "grad_bias": grad.sum(0),
    }


def got_of(backend: str, inputs: Arrays, dtype: str, soft_cap: float | None, **options: Any) -> Arrays:
    """The backend's loss, statistics and gradients, as float32."""
    names = ("targets", "ref_log_odds", "coefficients")
    if backend == "torch":
        import torch

        from bnf_torch import linear_bnf_loss as torch_loss

        leaves = [torch.tensor(inputs[k]).to(getattr(torch, dtype)) for k in ("hidden", "head_weight", "bias")]
        h, head, bias = (x.requires_grad_() for x in leaves)
        rest = [torch.tensor(inputs[k]) for k in names]
        loss, stats = torch_loss(h, head, *rest, bias=bias, soft_cap=soft_cap, **options)
        loss.backward()
        results = [x.detach().float().numpy() for x in (loss, *stats, h.grad, head.grad, bias.grad)]
    else:
        import mlx.core as mx

        from bnf_mlx import linear_bnf_loss as mlx_loss

        def fused(h: mx.array, head: mx.array, bias: mx.array) -> Any:
            rest = [mx.array(inputs[k]) for k in names]
            return mlx_loss(h, head, *rest, bias=bias, soft_cap=soft_cap, train_head=True, **options)

        with mx.stream(mx.cpu):
            arrays = [mx.array(inputs[k]).astype(getattr(mx, dtype)) for k in ("hidden", "head_weight", "bias")]
            (loss, stats), grads = mx.value_and_grad(fused, argnums=(0, 1, 2))(*arrays)
            results = [np.array(x.astype(mx.float32)) for x in (loss, *stats, *grads)]
    results_of = ("loss", "log_odds", "other_entropy", "token_loss", "grad_hidden", "grad_head", "grad_bias")
    return dict(zip(results_of, results, strict=True))


def check(backend: str, inputs: Arrays, dtype: str, soft_cap: float | None = None, **options: Any) -> None:
    """Every quantity within the tolerances of L2; a bias is the head of a hidden dimension that is always 1."""
    inputs = with_reference(inputs, soft_cap)
    got, expected = got_of(backend, inputs, dtype, soft_cap, **options), expected_of(inputs, soft_cap)
    total = np.abs(inputs["coefficients"] * expected["token_loss"]).sum()
    for name, e in expected.items():
        rows = {"grad_hidden": 1, "grad_head": 1, "grad_bias": 0}
        scale = np.abs(e).max(rows[name], keepdims=True) if name in rows else total if name == "loss" else np.abs(e)
        rtol, atol = Tolerances()("L2", "grad_head" if name == "grad_bias" else name, dtype)
        with np.errstate(invalid="ignore"):
            good = (got[name] == e) | (np.abs(got[name] - e) <= np.maximum(rtol * scale, atol))
        assert good.all(), f"{name}: {got[name][~good][:3]} and not {e[~good][:3]}, tolerance {rtol}, {(~good).sum()}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of the vocabulary, the last of them partial: 64, 64, 22 columns of 150; a CPU takes some rows of
    a block at a time."""
    if find_spec("torch"):
        monkeypatch.setattr("bnf_torch.linear.CUDA_BLOCK", 64)
        monkeypatch.setattr("bnf_torch.linear.UPCAST_BYTES", 64 * 4 * 8)
        monkeypatch.setattr("bnf_torch.linear.CACHED", 450)
    if find_spec("mlx"):
        monkeypatch.setattr("bnf_mlx.linear.UPCAST_BYTES", 64 * 4 * 8)
        monkeypatch.setattr("bnf_mlx.kernels.CACHED", 450)


@pytest.fixture
def wide_blocks(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer of them: the interpreter takes milliseconds for each row of each block."""
    if find_spec("torch"):
        monkeypatch.setattr("bnf_torch.linear.CUDA_BLOCK", 4096)


@on_both
@pytest.mark.parametrize(
    "dtype", [*(pytest.param(dtype, marks=long_interpreted) for dtype in ("float32", "float16")), "bfloat16"]
)
@pytest.mark.parametrize("chunk_tokens", [*(pytest.param(n, marks=long_interpreted) for n in (None, 1)), 8])
@pytest.mark.parametrize(
    "soft_cap", [pytest.param(None, marks=long_interpreted, id="uncapped"), pytest.param(4.0, id="capped")]
)
def test_bias_and_soft_cap(backend: str, dtype: str, chunk_tokens: int | None, soft_cap: float | None) -> None:
    check(backend, drawn(bias=True), dtype, soft_cap, chunk_tokens=chunk_tokens)


@on_both
def test_a_saturated_soft_cap_keeps_its_derivative(backend: str) -> None:
    """tanh is 1 to the last bits here; 1 − tanh² computed from it has no digits left."""
    inputs = drawn(scale=8.0)
    inputs["targets"] = (inputs["hidden"] @ inputs["head_weight"].T).argmax(1)
    check(backend, inputs, "float32", 6.0)


@on_both
@pytest.mark.parametrize(
    "dtype", [*(pytest.param(dtype, marks=long_interpreted) for dtype in ("float32", "float16")), "bfloat16"]
)
@pytest.mark.parametrize("shift", [9984.0, pytest.param(-9984.0, marks=long_interpreted)])
def test_large_logits(backend: str, dtype: str, shift: float) -> None:
    """A common shift and small steps, all exact, of which only the steps count."""
    inputs = drawn(dim=2)
    inputs["hidden"][:] = 0.25, 0.5
    inputs["head_weight"][:] = np.random.default_rng(0).integers(-32, 33, (150, 2))
    inputs["bias"][:] = shift
    check(backend, inputs, dtype)


@on_both
def test_banned_tokens(backend: str) -> None:
    """A bias of −inf bans a whole block, observed tokens among it, and all but the observed one."""
    inputs = drawn(bias=True)
    inputs["bias"][:64] = -np.inf
    inputs["targets"][:4] = 3, 63, 64, 149
    check(backend, inputs, "float32", chunk_tokens=8)
    inputs = drawn(vocab=2, bias=True)
    inputs["targets"][:] = np.arange(21) % 2
    inputs["bias"][0] = -np.inf
    got = got_of(backend, inputs, "float32", None)
    np.testing.assert_array_equal(got["log_odds"], np.where(inputs["targets"] == 1, np.inf, -np.inf))
    assert all(np.isfinite(got[name]).all() and not got[name].any() for name in got if name.startswith("grad"))


@on_both
@pytest.mark.usefixtures("wide_blocks")
def test_float16_holds_a_flat_vocabulary(backend: str) -> None:
    """Probabilities of 2^-14, and coefficients as a long batch has them."""
    inputs = drawn(n=6, vocab=16_384, dim=4, scale=0.01)
    check(backend, inputs, "float16")


@on_both
@pytest.mark.parametrize(
    ("change", "message"),
    [({"bias": slice(1, None)}, "bias"), ({"soft_cap": 0.0}, "soft_cap"), ({"soft_cap": -1.0}, "soft_cap")],
)
def test_malformed_input(backend: str, change: dict[str, Any], message: str) -> None:
    inputs = drawn()
    if isinstance(change.get("bias"), slice):
        inputs["bias"] = inputs["bias"][change["bias"]]
    with pytest.raises(ValueError, match=message):
        got_of(backend, inputs, "float32", change.get("soft_cap"))


# PyTorch ------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("under", ["autocast", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_last_bits_of_a_gradient_do_not_depend_on_autocast_or_on_compile(under: str) -> None:
    import torch

    from bnf_torch import linear_bnf_loss

    def grads(wrap: Any = lambda f: f) -> list[torch.Tensor]:
        inputs = {name: torch.tensor(x) for name, x in drawn(bias=True).items()}
        leaves = [inputs[name].requires_grad_() for name in ("hidden", "head_weight", "bias")]

        def loss(hidden: torch.Tensor, head_weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            rest = (inputs[name] for name in ("targets", "ref_log_odds", "coefficients"))
            return -3.0 * linear_bnf_loss(hidden, head_weight, *rest, bias=bias, soft_cap=4.0)[0]

        wrap(loss)(*leaves).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    plain = grads()
    if under == "compile":
        other = grads(lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            other = grads()
    assert len(plain) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@needs_torch
def test_what_is_not_asked_for_is_not_computed_and_a_second_backward_pass_is_refused() -> None:
    import torch

    from bnf_torch import linear_bnf_loss

    inputs = {name: torch.tensor(x) for name, x in drawn().items()}
    arguments = [inputs[name] for name in ("hidden", "head_weight", "targets", "ref_log_odds", "coefficients")]
    assert not linear_bnf_loss(*arguments)[0].requires_grad
    arguments[1].requires_grad_()
    with torch.no_grad():
        assert not linear_bnf_loss(*arguments)[0].requires_grad
    loss, stats = linear_bnf_loss(*arguments)
    assert not any(x.requires_grad for x in stats)
    loss.backward(retain_graph=True)
    assert arguments[0].grad is None and arguments[1].grad is not None
    with pytest.raises(RuntimeError, match="inplace"):  # and not a gradient that was scaled twice
        loss.backward()
    for outside in (-1, 150):
        arguments[2][4] = outside
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 150\)"):
            linear_bnf_loss(*arguments)
    empty = [arguments[0][:0], arguments[1], *(x[:0] for x in arguments[2:])]
    loss, stats = linear_bnf_loss(*empty)
    loss.backward()
    assert loss == 0 and stats.log_odds.shape == (0,) and not arguments[1].grad[5:].isnan().any()


@needs_torch
def test_half_precision_gradients_survive_a_small_coefficient_and_a_large_loss_scale() -> None:
    """Coefficients of 1e-7 are subnormal in float16; a scaler lifts the loss only after the gradient is finished."""
    import torch

    from bnf_torch import linear_bnf_loss

    inputs = drawn(bias=True)
    inputs["coefficients"] *= np.float32(2.0**-20)
    expected = expected_of(inputs, None)
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    leaves = [tensors[name].half().requires_grad_() for name in ("hidden", "head_weight", "bias")]
    rest = (tensors[name] for name in ("targets", "ref_log_odds", "coefficients"))
    (linear_bnf_loss(*leaves[:2], *rest, bias=leaves[2])[0] * 2.0**20).backward()
    for leaf, name in zip(leaves, ("grad_hidden", "grad_head", "grad_bias"), strict=True):
        assert leaf.grad is not None
        e = expected[name] * 2.0**20
        np.testing.assert_allclose(leaf.grad.double().numpy(), e, rtol=0, atol=2e-3 * np.abs(e).max())


@needs_torch
def test_what_is_done_to_the_loss_is_not_rounded_to_the_gradient_s_dtype() -> None:
    import torch

    from bnf_torch import linear_bnf_loss

    def gradient(factor: float) -> torch.Tensor:
        inputs = {name: torch.tensor(x) for name, x in drawn().items()}
        hidden, head = inputs["hidden"].bfloat16().requires_grad_(), inputs["head_weight"].bfloat16()
        rest = (inputs[name] for name in ("targets", "ref_log_odds", "coefficients"))
        (linear_bnf_loss(hidden, head, *rest)[0] * factor).backward()
        assert hidden.grad is not None
        return hidden.grad

    assert torch.equal(gradient(1 / 3), (gradient(1.0).float() * (1 / 3)).bfloat16())


# As on CUDA ---------------------------------------------------------------------------------------------------


def interpreted(options: list[str]) -> int:
    """These tests, and the Triton that PyTorch has imported already, imported anew."""
    for name in [name for name in sys.modules if re.fullmatch(rf"{__name__}|triton(?!\._C)(\..*)?", name)]:
        del sys.modules[name]
    return pytest.main(options)


@needs_torch
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.parametrize(
    ("which", "named"),
    [
        ("not slow", "the_kernel or the_fused_levels"),
        pytest.param("not slow", "not (the_kernel or the_fused_levels)", marks=pytest.mark.slow),
        pytest.param("slow", "", marks=pytest.mark.slow),
    ],
    ids=["the kernel", "the others", "slow"],
)
def test_all_of_it_as_on_cuda_under_the_interpreter(which: str, named: str, tmp_path: Path) -> None:
    """Everything above, and what follows, in another process: Triton decides when it is imported."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", which, "-k", f"not mlx{named and f' and ({named})'}"]
    environment, said = {"TRITON_INTERPRET": "1"}, tmp_path / "said"
    process = forked.start(interpreted, [*options, __file__], environment=environment, output=said)
    assert forked.ended(process, 3600) == 0, said.read_text()[-4000:]
    assert " passed" in said.read_text()


@on_cuda
@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("bfloat16", 3_000), *(pytest.param(d, 10**9, marks=pytest.mark.slow) for d in vectors.ALL)],
)
def test_the_fused_levels_conform(dtype: str, largest: int) -> None:
    subject = Subject(registry.get("torch").losses("cpu"), dtype)
    for case in vectors.load():
        if case.level == "L2" and dtype in case.dtypes and max(a.size for a in case.arrays.values()) <= largest:
            outcomes = list(checks.fused_head(subject, replace(case, fields={"chunk_tokens": [7]})))
            assert not [m for m in outcomes if isinstance(m, checks.Measurement) and not m.error <= m.tolerance]


@on_cuda
def test_it_is_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnf_torch import kernels, linear

    calls = []
    monkeypatch.setattr(
        linear, "_softmax", lambda on_cuda: lambda *a: calls.append(on_cuda) or kernels.exponentials(*a)
    )
    check("torch", drawn(), "bfloat16", chunk_tokens=7)
    assert calls == [True] * 3 * 3  # chunks × blocks


@on_cuda
@pytest.mark.parametrize("soft_cap", [None, 0.01, 4.0, 1000.0])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", None])
def test_the_kernel_is_the_function_it_replaces(soft_cap: float | None, stored: str | None) -> None:
    import torch

    from bnf_torch import kernels, linear

    z = torch.randn(6, 77, generator=torch.Generator().manual_seed(0)) * 9
    z[1], z[2, 3], z[3, :70] = -torch.inf, torch.nan, -torch.inf  # of the row with NaN, only its total must tell
    bias, observed = torch.linspace(-1, 1, 77), torch.tensor([0, 76, 5, -1, 77, 30])
    results = []
    for function in (linear.exponentials, kernels.exponentials):
        e = torch.full((6, 80), 7.0, dtype=getattr(torch, stored))[:, :77] if stored else None
        statistics = function(z.clone(), e, bias, observed, soft_cap)
        assert statistics[1, 2].isnan()
        results.append(
            [x[[0, 1, 3, 4, 5]].float() for x in (*statistics[: 4 if stored else 3], *([] if e is None else [e]))]
        )
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(a, b, rtol=8e-3 if stored == "bfloat16" and i > 2 else 3e-6, atol=1e-6)


@pytest.mark.slow
@on_cuda
def test_a_large_head_gradient_is_accumulated_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 where float32 does not fit; over a few chunks that stays within the tolerance."""
    from bnf_torch import linear

    monkeypatch.setattr(linear, "CUDA_BYTES", 2**10)
    added = []
    add = linear._add_product
    monkeypatch.setattr(linear, "_add_product", lambda g, *a: added.append(str(g.dtype)) or add(g, *a))
    inputs = drawn(n=40)
    inputs["targets"][5:20] = 7  # a token that comes often
    check("torch", inputs, "bfloat16", chunk_tokens=8)
    assert set(added) == {"torch.bfloat16"} and len(added) == 5 * 3
    added.clear()
    check("torch", inputs, "float16", chunk_tokens=8)
    assert set(added) == {"torch.float32"}


@on_cuda
@pytest.mark.parametrize("train_head", [False, True])
def test_what_a_large_head_needs_stays_below_its_limit(monkeypatch: pytest.MonkeyPatch, train_head: bool) -> None:
    import torch

    from bnf_torch import linear

    monkeypatch.undo()
    n, dim, vocab = 16_384, 4096, 128_256
    hidden, head = (torch.empty(rows, dim, dtype=torch.bfloat16, device="meta") for rows in (n, vocab))
    plan = linear._plan(hidden, head, train_head, None)
    assert [b.start for b in plan.blocks] == list(range(0, vocab, plan.width)) and plan.blocks[-1].stop == vocab
    assert plan.width <= 16_384 and plan.width % 64 == 0
    exponentials = 2 * len(plan.blocks) * plan.width * plan.chunk
    logits, states = 4 * plan.width * plan.chunk, 12 * dim * plan.chunk
    assert exponentials + max(logits, states) <= 2**30
    assert -(-n // plan.chunk) <= 8


@needs_torch
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
def test_the_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """Down to PTX: the interpreter accepts what the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bnf_torch.kernels import TILE, _exponentials

    flags = {"BIASED": True, "CAPPED": True, "STORED": True, "TILE": TILE}
    pointers = {"z_at": "*fp32", "e_at": "*bf16", "bias_at": "*bf16", "observed_at": "*i64", "statistics_at": "*fp32"}
    numbers = {"z_stride": "i32", "e_stride": "i32", "width": "i32", "soft_cap": "fp32"}
    types = pointers | numbers | dict.fromkeys(flags, "constexpr")
    signature = {name: types[name] for name in _exponentials.arg_names}
    source = ASTSource(fn=_exponentials, signature=signature, constexprs=flags)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    assert ".target sm_90" in compiled.asm["ptx"]
