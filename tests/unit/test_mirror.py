"""Both backends are one library: the same names, parameters, documentation and errors, and the same log-odds."""

import inspect
import re
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from test_kernels import drawn, logits_of

import bnf_mlx
import bnf_torch
from bnf_conformance.tolerances import Tolerances
from bnf_core import oracle

pytestmark = pytest.mark.skipif(not (find_spec("torch") and find_spec("mlx")), reason="needs both backends")

BACKENDS = {"torch": bnf_torch, "mlx": bnf_mlx}
on_both = pytest.mark.parametrize("backend", BACKENDS)


class Arrays:
    """One of the two libraries: NumPy in and out."""

    def __init__(self, backend: str):
        self.torch = backend == "torch"

    def __call__(self, x: Any, dtype: str = "float32") -> Any:
        if self.torch:
            import torch

            return torch.tensor(np.asarray(x)).to(getattr(torch, dtype))
        import mlx.core as mx

        return mx.array(np.asarray(x)).astype(getattr(mx, dtype))

    def numpy(self, x: Any) -> np.ndarray:
        if self.torch:
            return x.detach().float().numpy()
        import mlx.core as mx

        return np.array(x.astype(mx.float32))

    def vjp(self, function: Any, leaves: list[Any], trained: list[int], cotangent: np.ndarray) -> list[np.ndarray]:
        """Both results of function(*leaves), and the gradients of cotangent · the first in the trained leaves."""
        if self.torch:
            for i in trained:
                leaves[i].requires_grad_()
            first, second = function(*leaves)
            assert not second.requires_grad
            first.backward(self(cotangent))
            assert all(x.grad is None for i, x in enumerate(leaves) if i not in trained)
            return [self.numpy(x) for x in (first, second, *(leaves[i].grad for i in trained))]
        import mlx.core as mx

        def weighted(*leaves: Any) -> Any:
            results = function(*leaves)
            # A second result that were not detached would show in the gradients.
            return (self(cotangent) * results[0]).sum() + results[1].sum(), results

        with mx.stream(mx.cpu):
            (_, results), grads = mx.value_and_grad(weighted, argnums=trained)(*leaves)
            return [self.numpy(x) for x in (*results, *(grads if len(trained) > 1 else [grads]))]


# One interface


def shown(function: Any) -> list[tuple[str, Any, Any, str]]:
    """Name, kind, default and type of each parameter, whatever the library calls its arrays."""
    signature = inspect.signature(function)
    rows = [(p.name, p.kind, p.default, typed(p.annotation)) for p in signature.parameters.values()]
    return [*rows, ("return", None, None, typed(signature.return_annotation))]


def typed(annotation: Any) -> str:
    return re.sub(r"\b(mlx\.core\.array|torch\.Tensor|Tensor)\b", "Array", inspect.formatannotation(annotation))


def text_of(function: Any) -> str:
    """The docstring up to its code, which is the library's own."""
    return (inspect.getdoc(function) or "").partition("In plain code")[0]


def test_both_export_the_same_names() -> None:
    assert sorted(bnf_torch.__all__) == sorted(bnf_mlx.__all__)
    assert "linear_log_odds" in bnf_torch.__all__
    for package in BACKENDS.values():
        assert set(package.__all__) == set(package._MODULES)


@pytest.mark.parametrize("name", sorted({*bnf_torch.__all__, *bnf_mlx.__all__}))
def test_a_function_has_one_signature_and_one_documentation(name: str) -> None:
    ours, theirs = (getattr(package, name) for package in BACKENDS.values())
    assert shown(ours) == shown(theirs)
    assert text_of(ours) == text_of(theirs) and len(text_of(ours)) > 100


# One set of errors


def linear_case(**change: Any) -> dict[str, Any]:
    sizes = {"hidden": (5, 4), "head_weight": (7, 4), "ref_log_odds": (5,), "coefficients": (5,)}
    return {k: np.ones(v, np.float32) for k, v in sizes.items()} | {"targets": np.arange(5)} | change


BAD_LINEAR = {
    "one token": {"head_weight": np.ones((1, 4), np.float32), "targets": np.zeros(5, int)},
    "width": {"head_weight": np.ones((7, 3), np.float32)},
    "hidden of three dimensions": {"hidden": np.ones((1, 5, 4), np.float32)},
    "too few targets": {"targets": np.arange(4)},
    "targets of two dimensions": {"targets": np.arange(5)[:, None]},
    "target below": {"targets": np.array([0, 1, -1, 2, 3])},
    "target above": {"targets": np.array([0, 1, 7, 2, 3])},
    "bias": {"bias": np.ones(6, np.float32)},
    "soft_cap of 0": {"soft_cap": 0.0},
    "negative soft_cap": {"soft_cap": -1.0},
    "infinite soft_cap": {"soft_cap": float("inf")},
    "soft_cap that is no number": {"soft_cap": float("nan")},
    "chunk_tokens of 0": {"chunk_tokens": 0},
    "negative chunk_tokens": {"chunk_tokens": -3},
}


def called(backend: str, name: str, case: dict[str, Any]) -> Any:
    arrays = Arrays(backend)
    given = {k: arrays(v, str(v.dtype)) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    return getattr(BACKENDS[backend], name)(**given)


def complaint(backend: str, name: str, case: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        called(backend, name, case)
    return str(caught.value)


@pytest.mark.parametrize("change", BAD_LINEAR.values(), ids=BAD_LINEAR)
def test_linear_functions_refuse_the_same(change: dict[str, Any]) -> None:
    case = linear_case(**change)
    assert complaint("torch", "linear_bnf_loss", case) == complaint("mlx", "linear_bnf_loss", case)
    case = {k: v for k, v in case.items() if k not in ("ref_log_odds", "coefficients")}
    assert complaint("torch", "linear_log_odds", case) == complaint("mlx", "linear_log_odds", case)


@pytest.mark.parametrize("name", ["ref_log_odds", "coefficients"])
def test_the_loss_needs_one_number_for_each_token(name: str) -> None:
    case = linear_case(**{name: np.ones(4, np.float32)})
    assert complaint("torch", "linear_bnf_loss", case) == complaint("mlx", "linear_bnf_loss", case)


@pytest.mark.parametrize(
    ("vocab", "targets"),
    [(1, np.zeros(3, int)), (7, np.zeros(2, int)), (7, np.array([0, 7, 1])), (7, np.array([0, -1, 1]))],
    ids=["one token", "shape", "target above", "target below"],
)
def test_token_log_odds_refuses_the_same(vocab: int, targets: np.ndarray) -> None:
    case = {"logits": np.ones((3, vocab), np.float32), "targets": targets}
    assert complaint("torch", "token_log_odds", case) == complaint("mlx", "token_log_odds", case)


@pytest.mark.parametrize("name", ["log_odds", "other_entropy", "ref_log_odds"])
def test_bnf_token_loss_refuses_the_same(name: str) -> None:
    case = dict.fromkeys(("log_odds", "other_entropy", "ref_log_odds"), np.ones(3, np.float32))
    case[name] = np.ones(2, np.float32)
    assert complaint("torch", "bnf_token_loss", case) == complaint("mlx", "bnf_token_loss", case)


@on_both
@pytest.mark.parametrize("name", ["linear_bnf_loss", "linear_log_odds"])
def test_no_token_at_all_is_no_loss_and_gradients_of_zero(backend: str, name: str) -> None:
    arrays, width, vocab = Arrays(backend), 4, 7
    empty, targets = arrays(np.zeros(0)), arrays(np.zeros(0), "int64")

    def function(hidden: Any, head: Any, bias: Any) -> Any:
        if name == "linear_log_odds":
            return bnf.linear_log_odds(hidden, head, targets, bias=bias)
        loss, stats = bnf.linear_bnf_loss(hidden, head, targets, empty, empty, bias=bias)
        return loss, stats.token_loss

    bnf: Any = BACKENDS[backend]
    leaves = [arrays(np.ones(shape), "bfloat16") for shape in ((0, width), (vocab, width), (vocab,))]
    cotangent = np.zeros(0 if name == "linear_log_odds" else ())
    for trained in ([0], [0, 1, 2]):
        fresh = [arrays(arrays.numpy(x), "bfloat16") for x in leaves]
        first, second, *grads = arrays.vjp(function, fresh, trained, cotangent)
        assert first.shape == cotangent.shape and second.shape == (0,) and not first.any()
        for grad, i in zip(grads, trained, strict=True):
            assert grad.shape == leaves[i].shape and not grad.any()
    dense = called(backend, "token_log_odds", {"logits": np.ones((0, 7), np.float32), "targets": np.zeros(0, int)})
    assert [tuple(x.shape) for x in dense] == [(0,), (0,)]


@on_both
def test_a_head_that_is_announced_as_constant_gets_no_gradient(backend: str) -> None:
    arrays, inputs = Arrays(backend), drawn()
    rest = [arrays(inputs["targets"], "int64"), *(arrays(inputs[k]) for k in ("ref_log_odds", "coefficients"))]
    hidden, head = (arrays(inputs[k]) for k in ("hidden", "head_weight"))

    def loss(hidden: Any, head: Any) -> Any:
        return BACKENDS[backend].linear_bnf_loss(hidden, head, *rest, train_head=False)[0]

    if backend == "torch":
        loss(hidden.requires_grad_(), head.requires_grad_()).backward()
        assert hidden.grad.any() and head.grad is None
    else:
        import mlx.core as mx

        grad_hidden, grad_head = mx.grad(loss, argnums=(0, 1))(hidden, head)
        assert np.array(grad_hidden).any() and not np.array(grad_head).any()


@pytest.mark.usefixtures("mlx_compiles")
def test_compiled_functions_do_not_look_at_values() -> None:
    import mlx.core as mx
    import torch

    logits, targets = np.ones((3, 7), np.float32), np.arange(3)
    compiled = torch.compile(bnf_torch.token_log_odds, backend="aot_eager", fullgraph=True)
    got = compiled(torch.tensor(logits), torch.tensor(targets))[0]
    np.testing.assert_allclose(got.numpy(), -np.log(6), rtol=1e-6)
    same = mx.compile(bnf_mlx.token_log_odds)(mx.array(logits), mx.array(targets))[0]
    np.testing.assert_allclose(np.array(same), -np.log(6), rtol=1e-6)


# Log-odds


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of a half-precision head's vocabulary of 150, the last of them partial."""
    for module in ("bnf_torch.linear", "bnf_mlx.linear"):
        monkeypatch.setattr(f"{module}.UPCAST_BYTES", 64 * 4 * 8)


def expected_of(inputs: dict[str, np.ndarray], soft_cap: float | None, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """The oracle in float64. ∂o/∂z is 1 at the observed token and −q elsewhere, q the softmax of the others."""
    (logits, slope), y = logits_of(inputs, soft_cap), inputs["targets"]
    at = (np.arange(len(y)), y)
    others = logits.copy()
    others[at] = -np.inf
    grad = -np.exp(others - np.logaddexp.reduce(others, axis=1, keepdims=True))
    grad[at] = 1.0
    grad *= cotangent.astype(np.float64)[:, None] * slope
    return {
        "log_odds": oracle.log_odds(logits, y),
        "other_entropy": oracle.other_entropy(logits, y),
        "grad_hidden": grad @ inputs["head_weight"].astype(np.float64),
        "grad_head": grad.T @ inputs["hidden"].astype(np.float64),
        "grad_bias": grad.sum(0),
    }


@on_both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("soft_cap", [None, 4.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_linear_log_odds(
    backend: str, dtype: str, biased: bool, soft_cap: float | None, train_head: bool, chunk_tokens: int | None
) -> None:
    arrays, inputs = Arrays(backend), drawn(bias=biased)
    # All below 1, as coefficients are: gradients are then kept in a smaller unit.
    cotangent = (np.random.default_rng(3).normal(size=len(inputs["targets"])) / 64).astype(np.float32)
    names = ["hidden", "head_weight", *(["bias"] if biased else [])]
    targets = arrays(inputs["targets"], "int64")

    def function(hidden: Any, head: Any, bias: Any = None) -> Any:
        options = {"bias": bias, "soft_cap": soft_cap, "chunk_tokens": chunk_tokens}
        return BACKENDS[backend].linear_log_odds(hidden, head, targets, **options)

    trained = list(range(len(names))) if train_head else [0]
    results = arrays.vjp(function, [arrays(inputs[name], dtype) for name in names], trained, cotangent)
    expected = expected_of(inputs, soft_cap, cotangent)
    rows = {"grad_hidden": 1, "grad_head": 1, "grad_bias": 0}
    for (name, e), got in zip(expected.items(), results, strict=False):
        scale = np.abs(e).max(rows[name], keepdims=True) if name in rows else np.abs(e)
        rtol, atol = Tolerances()("L2", "grad_head" if name == "grad_bias" else name, dtype)
        good = np.abs(got - e) <= np.maximum(rtol * scale, atol)
        assert got.shape == e.shape and good.all(), f"{name}: {got[~good][:3]} and not {e[~good][:3]}, {rtol}"
    assert len(results) == 2 + len(trained)


@on_both
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_how_often_the_head_is_multiplied(backend: str, train_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for logits and once for gradients of one chunk with a frozen head; the backward pass needs no more."""
    module, arrays, inputs = f"bnf_{backend}.linear", Arrays(backend), drawn()
    linear = __import__(module, fromlist=["linear"])
    products = []
    for name in ("_logits", "_product" if backend == "torch" else "_times_head"):
        made = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *a, f=made, n=name, **k: products.append(n) or f(*a, **k))
    targets = arrays(inputs["targets"], "int64")
    leaves = [arrays(inputs["hidden"]), arrays(inputs["head_weight"])]
    trained = [0, 1] if train_head else [0]
    arrays.vjp(lambda h, w: linear.linear_log_odds(h, w, targets, chunk_tokens=21), leaves, trained, np.ones(21))
    if not train_head and backend == "torch":
        assert products == ["_logits", "_product"]
    if train_head or backend == "mlx":  # MLX writes down the second pass, and computes it where it is asked for
        assert products.count("_logits") == 2


def test_linear_log_odds_of_torch_under_compile_and_autocast() -> None:
    import torch

    inputs = drawn(bias=True)
    targets, names = torch.tensor(inputs["targets"]), ("hidden", "head_weight", "bias")

    def grads(trained: int, wrap: Any) -> list[torch.Tensor]:
        leaves = [torch.tensor(inputs[name]).requires_grad_(i < trained) for i, name in enumerate(names)]

        def loss(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return bnf_torch.linear_log_odds(hidden, head, targets, bias=bias, soft_cap=4.0)[0].sin().sum()

        wrap(loss)(*leaves).backward()
        return [leaf.grad for leaf in leaves[:trained] if leaf.grad is not None]

    for trained in (1, 3):
        plain = grads(trained, lambda f: f)
        assert len(plain) == trained
        compiled = grads(trained, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
        with torch.autocast("cpu", torch.bfloat16):
            autocast = grads(trained, lambda f: f)
        for other in (compiled, autocast):
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    with torch.no_grad():
        head = torch.tensor(inputs["head_weight"]).requires_grad_()
        log_odds, _ = bnf_torch.linear_log_odds(torch.tensor(inputs["hidden"]), head, targets)
    assert not log_odds.requires_grad
