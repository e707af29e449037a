"""What layers of any kind keep in memory while they are trained: measured, with random weights of few tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bnf_core.errors import UserError
from bnf_core.models.architecture import Training
from bnf_core.models.layers import Layers, kinds_of
from bnf_core.models.model_config import Config, full_config, text_config
from bnf_core.objectives.bnf import BNF
from bnf_core.steps.batching import collate
from bnf_core.types import Example
from bnf_mlx import adapter
from bnf_mlx.corrections import correct, without_ignored_scaling
from bnf_mlx.model import DTYPES, cast_weights, multiply_in_float32, unfreeze
from bnf_mlx.optimizer import flat
from bnf_mlx.scored import MicroStep, ScoredModel

WIDEST, WIDEST_BY_TOKEN = 512, 64  # tokens in a row; of layers that go from token to token
BY_TOKEN = ("qwen3_next",)
# Families, as mlx-lm calls them, of which measuring does not tell within 15%.
REFUSED = {
    "nemotron_h": "some of its layers train nothing by themselves",
    "qwen3_5": "a model of it takes a fifth less than its layers measured one by one",
}
VOCAB = 64


def measured(folder: Path, training: Training, device: mx.Device) -> Layers:
    """The layers of a checkpoint, of which the configuration is read alone.

    Raises:
        UserError: mlx-lm cannot make such a model.
    """
    config = full_config(folder)
    text = text_config(config)
    if reason := REFUSED.get(text["model_type"]):
        raise UserError(
            f"{folder}: what {text['model_type']} keeps in memory is not known on mlx, for {reason}: --backend torch "
            "plans it"
        )
    if "quantization" in config or "quantization_config" in config:
        raise UserError(f"{folder} is quantised: what its layers keep is not measured, of {text['model_type']}")
    try:
        with mx.stream(device):
            whole = _made(config, training, device)  # nothing is computed of it
            trial = _Trial(_made(_with(config, vocab_size=VOCAB), training, device), training, device)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:  # mlx-lm raises whatever it likes
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: mlx-lm cannot make this model: {reason}") from error
    frozen = sum(x.size for path, x in flat(whole.parameters()).items() if "lora_" not in path)
    return Layers(
        kinds=trial.kinds,
        hidden=text["hidden_size"],
        vocab=text["vocab_size"],
        parameters=frozen,
        linear_parameters=sum(m.weight.size for m in whole.modules() if isinstance(m, nn.Linear)),
        trained=sum(x.size for x in flat(whole.trainable_parameters()).values()),
        peak=trial.peak,
        widest=WIDEST_BY_TOKEN if text["model_type"] in BY_TOKEN else WIDEST,
        how=f"of {len(set(trial.kinds))} kinds, measured on {device.type.name} with random weights",
    )


def _with(config: Config, **settings: Any) -> Config:
    """A config with other settings of its language model."""
    if text_config(config) is config:
        return config | settings
    return config | {"text_config": config["text_config"] | settings}


def _made(config: Config, training: Training, device: mx.Device) -> nn.Module:
    """A model of random weights, as it is trained. Its arrays are not computed."""
    from mlx_lm.utils import _get_classes

    config = without_ignored_scaling(config)
    kind, settings = _get_classes(config)
    model = kind(settings.from_dict(config))
    correct(model, config, Path())
    full = training.kind == "full"
    cast_weights(model, mx.float32 if full else DTYPES[training.dtype])
    if device == mx.Device(mx.cpu):
        multiply_in_float32(model)
    model.freeze()
    if full:
        unfreeze(model)
    else:
        adapter.add_adapter(model, training.lora, 0, training.kind)
    return model


class _Trial:
    """A small model that is trained on rows of one token again and again."""

    def __init__(self, model: nn.Module, training: Training, device: mx.Device):
        self.model, self.training, self.device = model, training, device
        self.layers = _list_of(model)
        self.kinds = kinds_of([_parts(layer) for layer in self.layers])

    def peak(self, places: Mapping[int, int], rows: int, width: int) -> float:
        """`Layers.peak`."""
        row = Example((1,) * (width - 1), (1,), True)
        batch = collate([row] * rows, rows)
        with mx.stream(self.device), self._layers(places):
            mx.eval(self.model.parameters())
            scored = ScoredModel(
                self.model,
                self.device,
                BNF(),
                gradient_checkpointing=self.training.gradient_checkpointing,
                compiled=self.device == mx.Device(mx.gpu),
            )
            step = MicroStep(scored)
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            step(batch, np.zeros(len(batch.targets), np.float32))
            peak = mx.get_peak_memory() - before
            gradients = sum(x.nbytes for x in flat(self.model.trainable_parameters()).values())
        return float(peak - gradients)

    @contextmanager
    def _layers(self, places: Mapping[int, int]) -> Iterator[None]:
        """In these places the layers named, in all others nothing."""
        layers = list(self.layers)
        self.layers[:] = [layers[places[i]] if i in places else _Skipped(layer) for i, layer in enumerate(layers)]
        try:
            yield
        finally:
            self.layers[:] = layers


class _Skipped(nn.Module):
    """In the place of a layer: gives back its input. The rest of the layer can be seen through."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return x


def _list_of(model: nn.Module) -> list[Any]:
    """The model's own list of layers, where `layers` is a slice of it."""
    lists = [module["layers"] for module in model.modules() if isinstance(module.get("layers"), list)]
    return next(found for found in lists if found and found[0] is model.layers[0])


def _parts(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer is made of."""
    return (
        tuple((name, type(module)) for name, module in layer.named_modules()),
        tuple((name, x.shape) for name, x in flat(layer.parameters()).items()),
    )
