"""A run that has ended, as the commands see it that share what it has trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout
from transformers import PreTrainedTokenizerBase

from bnf_core.data.rendering import Chat
from bnf_core.errors import UserError
from bnf_core.storage.files import lock

CARD = "README.md"  # in the folder of what was trained; a run writes it last


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    settings: dict[str, Any]  # as config.yaml has them
    trained: Path  # the adapter, or after full fine-tuning the model

    @property
    def model(self) -> str:
        """The base model, a folder or a Hub id."""
        return str(self.settings["model"])

    @property
    def adapter(self) -> Path | None:
        """None: all weights were trained."""
        return None if self.trained.name == "model" else self.trained

    @property
    def backend(self) -> str:
        """That trained it."""
        return str(self._of("hardware", "backend") or "auto")

    @property
    def command(self) -> str:
        return "online" if "judge" in self.settings else "train"

    def chat(self) -> Chat:
        """How messages became text."""
        of = [self._of("data", name) for name in ("chat_template", "template_kwargs", "date")]
        return Chat.of(of[0], of[1] or {}, of[2])

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """The text of the chat template that it was given instead of the model's own; None: it was given none."""
        chosen = self.chat().template
        return None if chosen is None else str(tokenizer.get_chat_template(chosen))

    def _of(self, group: str, name: str) -> Any:
        settings = self.settings.get(group)
        return settings.get(name) if isinstance(settings, dict) else None


@contextmanager
def finished_run(folder: Path, *, whole: bool = True) -> Iterator[FinishedRun]:
    """What a run left, which no other run writes to meanwhile.

    Args:
        whole: whether it must have come to its end, or its newest weights will do.
    Raises:
        UserError: no run, one that is being written to or has not ended, or nothing was trained.
    """
    if not (folder / "config.yaml").is_file():
        inside = folder.parent if (folder.parent / "config.yaml").is_file() else None
        hint = f": name the run itself, {inside}" if inside else ": expected the folder that `bnf train` wrote"
        raise UserError(f"{folder} is no run, it has no config.yaml{hint}")
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read: {error}") from error
    if not isinstance(settings, dict) or "model" not in settings:
        raise UserError(f"{folder / 'config.yaml'} holds no settings of a run: it names no model")
    held = None
    try:
        held = lock(folder / ".lock", wait=False)
    except Timeout as error:
        raise UserError(f"a run is writing to {folder}: wait for its end") from error
    except OSError:  # a folder that may only be read: nobody writes to it
        pass
    try:
        kind = "model" if settings.get("fine_tune_type") == "full" else "adapter"
        run = FinishedRun(folder, settings, folder / kind)
        if not any(run.trained.glob("*.safetensors")):
            raise UserError(f"{folder} has trained nothing yet: there is no {run.trained.name} with weights in it")
        if whole and not (run.trained / CARD).is_file():
            raise UserError(
                f"{folder} has not come to its end (no {run.trained.name}/{CARD}): finish it with "
                f"bnf {run.command} --config {folder / 'config.yaml'} --resume"
            )
        yield run
    finally:
        if held is not None:
            held.release()
