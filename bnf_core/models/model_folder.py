"""From the name of a model to a folder that both backends can load: config.json and safetensors weights.

Weights come as safetensors only. The older .bin and .pt files are pickles, which run whatever code is in them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from bnf_core.errors import UserError
from bnf_core.storage.tensors import model_tensors, require_whole, weight_files

# What is fetched from the Hub: never pickles, never code.
ALLOWED = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model"]
COMPANIONS = (".json", ".jinja", ".txt", ".model")  # beside the weights
NAMED_TEMPLATES = "additional_chat_templates"  # the folder of those that transformers knows by name, NAME.jinja
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # a name, or owner/name


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """The checkpoint folder of that name: a local folder, or a Hub model, which is downloaded once.

    Args:
        name: a folder with config.json and model*.safetensors, or a Hub id such as `owner/model`.
        weights: whether they are needed; else they are neither downloaded nor looked for.
    Returns:
        A folder whose configuration can be read and whose weight files are all there and whole.
    Raises:
        UserError: no such folder or Hub model, the Hub out of reach, no configuration, no weights, weights in
            pickles only, a missing or damaged weight file, or files of which it cannot be told whether they belong to
            the model.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        hint = "convert it with `bnf import-gguf`" if folder.suffix == ".gguf" else "name the folder it is in"
        raise UserError(f"model {name} is a file: expected a checkpoint folder or a Hub id; {hint}")
    if not folder.is_dir():
        folder = _download(name, weights)
    _check(folder, weights)
    return folder


def copy_companions(source: Path, target: Path) -> None:
    """Copy what goes with a checkpoint's weights, such as tokenizer, configuration and chat template, but not the
    weights, nor the index that says in which files they are.

    Args:
        source: a checkpoint folder.
        target: a folder that is there; what it has under the same names is replaced.
    Raises:
        OSError: a file cannot be read or written.
    """
    for path in sorted(source.iterdir()):
        if path.suffix in COMPANIONS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if (source / NAMED_TEMPLATES).is_dir():
        shutil.copytree(source / NAMED_TEMPLATES, target / NAMED_TEMPLATES, dirs_exist_ok=True)


def _check(folder: Path, with_weights: bool) -> None:
    _read_json(folder / "config.json", _without_config(folder))
    if not with_weights:
        return
    if not any(folder.glob("model*.safetensors")):
        raise UserError(_without_weights(folder))
    for path in weight_files(folder):
        require_whole(path)
    model_tensors(folder)


def _read_json(path: Path, if_missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(if_missing)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"model {folder} is an adapter (it has adapter_config.json, not config.json): name its base model"
    if any(folder.glob("*.gguf")):
        return f"model {folder} holds a GGUF file, no config.json: convert it with `bnf import-gguf`"
    return f"model {folder} has no config.json: expected a checkpoint folder with config.json and model.safetensors"


def _without_weights(folder: Path) -> str:
    expected = f"model {folder} has no weights: expected model.safetensors"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        return expected + (f", found {', '.join(others)}" if others else "")
    return (
        f"{expected}, found {pickles[0]}, a pickle, which could run code and is never opened; if you trust it, "
        "convert it once with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


def _download(name: str, weights: bool) -> Path:
    neither = f"model {name!r} is neither a folder here nor a model on the Hub"
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{neither}: no such folder, and a Hub id reads owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = [pattern for pattern in ALLOWED if weights or "safetensors" not in pattern]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(f"model {name!r} is gated: accept its terms on the Hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{neither}; if it is private: `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise UserError(f"model {name!r}: no such folder here, and the Hub cannot be reached ({error})") from error
    except Exception as error:  # the Hub's client has dozens of ways to fail, of several HTTP libraries
        raise UserError(f"model {name!r}: no such folder here, and the download failed: {error}") from error
