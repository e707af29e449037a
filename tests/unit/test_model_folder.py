"""Names of models: what is accepted, and what every refusal says."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bnf_core.errors import UserError
from bnf_core.models.model_folder import copy_companions, resolve_model
from bnf_core.storage.digests import model_digest
from bnf_core.storage.tensors import INDEX, model_tensors, weight_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": np.ones((4, 8), np.float32)}, model / "model.safetensors")
    return model


def refused(name: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(str(name))
    return str(caught.value)


def test_accepts_a_checkpoint_folder(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder


def test_refuses_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


def test_names_an_adapter_as_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "name its base model" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_refuses_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


def test_refuses_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "no weights" in refused(folder) and "other.safetensors" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_never_opens_a_pickle(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    message = refused(folder)
    assert name in message and "pickle" in message and "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_refuses_cut_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "not a whole safetensors file" in refused(folder)


def test_refuses_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "names model-00002-of-00002.safetensors" in refused(folder)
    save_file({"b": np.ones(1, np.float32)}, folder / "model-00002-of-00002.safetensors")
    assert resolve_model(str(folder)) == folder


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        (["model.safetensors", *SHARDS], None, "which files are the model cannot be told"),
        (["model.safetensors", *SHARDS], SHARDS, "and model.safetensors are there"),
        (["model.safetensors", *SHARDS], ["model.safetensors"], f"and {', '.join(SHARDS)} are there"),
        ([*SHARDS, "model-00001-of-00003.safetensors"], SHARDS, "and model-00001-of-00003.safetensors are there"),
        (["model.safetensors", "model.fp16.safetensors"], None, "which files are the model cannot be told"),
        ([SHARDS[0], "model-00003-of-00003.safetensors"], None, "which files are the model cannot be told"),
        (["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"], None, "are missing"),
        (SHARDS, None, None),
        (SHARDS, SHARDS, None),
        (["model.safetensors"], ["model.safetensors"], None),
    ],
)
def test_which_files_are_the_model(
    folder: Path, files: list[str], index: list[str] | None, message: str | None
) -> None:
    """transformers reads model.safetensors first and mlx-lm all there are, so that files of an older save would make
    them different models. Rejects either's own choice."""
    (folder / "model.safetensors").unlink()
    for i, name in enumerate(files):
        save_file({f"weight{i}": np.ones(2, np.float32)}, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(index))}))
    if message is None:
        assert resolve_model(str(folder)) == folder
        assert [path.name for path in weight_files(folder)] == sorted(files)
        return
    assert message in refused(folder)
    for read in (model_tensors, model_digest):
        with pytest.raises(UserError):
            read(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in SHARDS:
        save_file({"weight": np.ones(2, np.float32)}, folder / name)
    assert f"weight is in {SHARDS[0]} and in {SHARDS[1]}" in refused(folder)


def test_an_index_that_is_none_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text('["model.safetensors"]')
    assert "is no index of weights" in refused(folder)


def test_refuses_files(folder: Path) -> None:
    assert "name the folder" in refused(folder / "model.safetensors")
    gguf = folder / "m.gguf"
    gguf.write_bytes(b"GGUF")
    assert "import-gguf" in refused(gguf)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "", "owner/na me"])
def test_refuses_what_cannot_be_a_hub_id_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir("/")
    if name:  # Path("") is the current folder
        assert "neither a folder here nor a model on the Hub" in refused(name)
    else:
        assert "no config.json" in refused(name)


def test_fetches_from_the_hub_neither_pickles_nor_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: list[object] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        repository = [
            "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json",
            "chat_template.jinja", "merges.txt", "tokenizer.model",
            "pytorch_model.bin", "modeling_x.py", "optimizer.pt",
        ]  # fmt: skip
        kept = list(filter_repo_objects(repository, allow_patterns=allow_patterns))
        assert kept == repository[:7]
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("owner/model") == folder
    assert asked == ["owner/model"]


def test_checks_what_came_from_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert "no weights" in refused("owner/model")


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "OfflineModeIsEnabled"])
def test_says_that_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    import huggingface_hub.errors

    def snapshot_download(*_: object, **__: object) -> str:
        raise getattr(huggingface_hub.errors, error)("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    message = refused("owner/model")
    assert "no such folder here" in message and "no route" in message


def test_what_goes_with_the_weights_is_copied_without_them_and_their_index(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {"config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model"}
    for name in kept | {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}:
        (source / name).write_text(name)
    named = "additional_chat_templates/tool_use.jinja"
    (source / named).parent.mkdir()
    (source / named).write_text("tools")
    (target / "config.json").write_text("old")
    copy_companions(source, target)
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {name: name for name in kept} | {named: "tools"}
