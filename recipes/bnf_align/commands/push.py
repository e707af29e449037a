"""`bnf push`: what a run has trained, to the Hub in one commit: adapter or model, tokenizer and model card."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bnf_align.run.card import for_the_hub
from bnf_align.run.finished import CARD, FinishedRun, finished_run
from bnf_core.config import TrainConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import Failed, UserError
from bnf_core.models.adapters import CONFIG, with_base
from bnf_core.models.model_folder import NAMED_TEMPLATES, resolve_model

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SAMPLES = ("samples.jsonl", "samples.md")
TOKENIZER = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|.*\.tiktoken|spiece\.model|chat_template\.(jinja|json)"
)


@dataclass
class PushConfig:
    """Push what a run has trained to the Hub: adapter or model, tokenizer and model card. Checkpoints, data and samples
    stay here."""

    run: str
    """The folder of a finished run."""
    repo: str
    """OWNER/NAME, or NAME among your own; made where it is not there."""
    private: bool = False
    """Where it is made: for you and your organisation alone. Default: as your account is set, which is public."""
    base_model: str | None = None
    """What the base model is called on the Hub, of a run that names a folder of this machine."""
    samples: bool = False
    """Push samples.jsonl and samples.md as well, with the held-out prompts in them."""


def push(
    run: Path,
    repo: str,
    console: Console,
    *,
    private: bool = False,
    base_model: str | None = None,
    samples: bool = False,
) -> str:
    """Push what a run has trained, all in one commit.

    Args:
        run: the folder of a finished run.
        repo: OWNER/NAME, or NAME among the user's own; made where it is not there.
        private: where it is made.
        base_model: what the base model is called on the Hub; default: as the run names it.
        samples: push these as well.
    Returns:
        The address of the repository.
    Raises:
        UserError: no finished run, no token, a name that the Hub does not take, or no right to write there.
        Failed: the Hub cannot be reached, or did not take it.
    """
    with finished_run(run) as finished:
        files = to_push(finished, samples=samples)
        api, repo = hub(repo)
        base = base_model or (None if Path(finished.model).expanduser().is_dir() else finished.model)
        if base is None:
            console.print(
                f"the base model is a folder of this machine, {finished.model}: name it for others with --base-model",
                style="yellow",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        size = sum(path.stat().st_size for path in files.values())
        console.print(f"{len(files)} files, {size:,} bytes, to {api.endpoint}/{repo}", highlight=False, soft_wrap=True)
        return _commit(api, repo, files, finished, base, private)


def to_push(run: FinishedRun, *, samples: bool = False) -> dict[str, Path]:
    """The files of a run that others need, by their paths in the repository.

    Raises:
        UserError: the base model is not there, or there are no samples.
    """
    files = {str(path.relative_to(run.trained)): path for path in sorted(run.trained.rglob("*")) if path.is_file()}
    if run.adapter is not None:
        base = resolve_model(run.model, weights=False)
        found = [path for path in base.iterdir() if TOKENIZER.fullmatch(path.name)]
        found += (base / NAMED_TEMPLATES).glob("*.jinja")
        files = {str(path.relative_to(base)): path for path in sorted(found)} | files
    if samples:
        absent = [name for name in SAMPLES if not (run.folder / name).is_file()]
        if absent:
            raise UserError(f"{run.folder} has no {absent[0]}: it sampled nothing (sample_every)")
        files |= {name: run.folder / name for name in SAMPLES}
    return files


def require_hub(config: TrainConfig) -> None:
    """Before a run that is to be pushed: whether it can be.

    Raises:
        As `push`.
    """
    if config.push_to_hub is not None:
        hub(config.push_to_hub)


def push_run(config: TrainConfig, console: Console) -> None:
    """After it.

    Raises:
        As `push`; the message says how to push it later.
    """
    if config.push_to_hub is None:
        return
    try:
        address = push(Path(config.output), config.push_to_hub, console, private=config.hub_private_repo)
    except (UserError, Failed) as error:
        again = f"bnf push {config.output} {config.push_to_hub}"
        raise Failed(f"{error}. The run itself is complete; to push it later: {again}") from error
    console.print(f"pushed   {address}", highlight=False, markup=False)


def hub(repo: str) -> tuple["HfApi", str]:
    """The Hub's client for whoever is logged in, and the repository's whole name.

    Raises:
        UserError: a name that the Hub does not take, no token, or one that it does not know.
        Failed: it cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    with _in_words(repo):
        validate_repo_id(repo)
        own = str(api.whoami()["name"])
    return api, repo if "/" in repo else f"{own}/{repo}"


def _commit(api: "HfApi", repo: str, files: dict[str, Path], run: FinishedRun, base: str | None, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd

    contents: dict[str, Path | bytes] = dict(files)
    contents[CARD] = for_the_hub(files[CARD].read_text(encoding="utf-8"), repo, run.model, base).encode()
    if base is not None and CONFIG in files:
        contents[CONFIG] = with_base(files[CONFIG].read_text(encoding="utf-8"), base).encode()
    added = [CommitOperationAdd(name, content) for name, content in contents.items()]
    what = "model" if run.adapter is None else "adapter"
    if template := run.template(load_tokenizer(resolve_model(run.model, weights=False))):
        contents["chat_template.jinja"] = template.encode()
    with _in_words(repo):
        url = api.create_repo(repo, private=True if private else None, exist_ok=True)
        api.create_commit(repo, added, commit_message=f"Upload {what} trained with bnf-align")
    return str(url)


@contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """What the Hub's client raises, as messages for people."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(
            "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error
    except HFValidationError as error:
        raise UserError(f"repo is {repo!r}: expected OWNER/NAME of letters, digits and -_. ({error})") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise UserError(
                "the Hub does not know this token: log in anew with `hf auth login`, or set HF_TOKEN"
            ) from error
        if status in (403, 404):
            raise UserError(
                f"this token may not write to {repo}: take one with the right to write, and a name of your own or of "
                f"an organisation you belong to ({_first_line(error)})"
            ) from error
        raise Failed(f"the Hub did not take {repo}: {_first_line(error)}") from error
    except Exception as error:  # the Hub's client has dozens of ways to fail, of several HTTP libraries
        raise Failed(f"the Hub cannot be reached, or did not take {repo}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


Config = PushConfig
POSITIONAL = ("--run", "--repo")


def run(config: PushConfig, console: Console) -> int:
    address = push(
        Path(config.run),
        config.repo,
        console,
        private=config.private,
        base_model=config.base_model,
        samples=config.samples,
    )
    console.print(f"pushed  {address}", highlight=False, markup=False)
    return 0
