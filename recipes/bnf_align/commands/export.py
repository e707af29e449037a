"""`bnf export`: what a run has trained, as other programs read it; each opened again and held against the run.

merged   one model of base and adapter, as transformers opens it
peft     the adapter in PEFT's layout
mlx      one model, as mlx-lm and LM Studio open it; a quantised base stays quantised
gguf     one file for llama.cpp and LM Studio
ollama   the same with a Modelfile: `ollama create NAME -f Modelfile`
"""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from bnf_align.commands.convert_adapter import require_free
from bnf_align.commands.fuse import stored_dtype, write_fused
from bnf_align.commands.import_gguf import import_gguf
from bnf_align.run.finished import FinishedRun, finished_run
from bnf_align.run.gguf_writer import GGUFType, require_gguf_writer, write_gguf
from bnf_align.run.ollama import modelfile
from bnf_align.run.run_folder import recorded_setting
from bnf_core import registry
from bnf_core.config import DType
from bnf_core.data.tokenization import load_tokenizer, pad_id, prompt_ids, stop_ids
from bnf_core.errors import Failed, UserError
from bnf_core.models.adapters import (
    CONFIG,
    Adapter,
    Layout,
    adapter_layout,
    matrix_shapes,
    read_adapter,
    with_base,
    write_adapter,
)
from bnf_core.models.model_config import raw_config
from bnf_core.models.model_folder import resolve_model
from bnf_core.models.quantization import quantization_of
from bnf_core.steps.batching import collate
from bnf_core.storage.files import replacing
from bnf_core.types import Array, Example

RECORD = "bnf_export.json"  # of which run a folder is, and how it compares with it
PROMPT, TOKENS = "What is the capital of France?", 32
SAMPLES = ("Hello, world!", "  two spaces\n\n12 + 345 = 357\t\tétude 日本 🙂", "def f(x):\n    return x**2\n")
# Mean difference in the log-odds of the run's own tokens, in nats, by what weights are stored as. One row of weights in
# another's place is off by several.
BOUNDS = {"float32": 1e-3, "f32": 1e-3, "float16": 0.1, "f16": 0.1, "bfloat16": 0.5, "bf16": 0.5, "q8_0": 0.5}


@dataclass
class ExportConfig:
    """Write what a run has trained as other programs read it. Each export is opened again: 32 tokens, chosen greedily,
    and their log-odds are compared with the run's."""

    run: str
    """The folder of a run."""
    to: list[str]
    """One or several of merged, peft, mlx, gguf, ollama."""
    output: str | None = None
    """Where, with a folder for each; default: `export` in the run's folder."""
    publisher: str | None = None
    """LM Studio's layout: gguf and mlx go to OUTPUT/PUBLISHER/RUN-gguf and RUN-mlx; OUTPUT is ~/.lmstudio/models."""
    dtype: DType = "auto"
    """Of the weights of merged and mlx; `auto` is the base model's own."""
    gguf_type: GGUFType = "f16"
    """What the matrices of a GGUF are stored as: f32, f16, bf16, or q8_0 with 8 bits."""
    llama_cpp: str | None = None
    """A folder of llama.cpp, whose convert_hf_to_gguf.py then writes the GGUF; default: the one on PATH, or else the
    package gguf."""
    check: bool = True
    """Open each again and compare."""
    force: bool = False
    """Replace exports that are there."""

    def __post_init__(self) -> None:
        unknown = [target for target in self.to if target not in TARGETS]
        if unknown or not self.to:
            raise ValueError(f"to is {unknown or self.to}: expected some of {', '.join(TARGETS)}")


@dataclass(frozen=True)
class Said:
    """What a model says to the prompt."""

    ids: list[int]  # greedily
    log_odds: Array  # (TOKENS,) of the tokens that the run says


@dataclass(frozen=True)
class Exported:
    target: str
    folder: Path
    size: int
    check: str  # how it compares, for people


def export(config: ExportConfig, console: Console) -> list[Exported]:
    """Write the targets, one after the other.

    Raises:
        UserError: no run, a target that it has nothing for, a family or template that a target does not know, a package
            missing, or a folder that is taken; nothing has been written of that target.
        Failed: what was written says otherwise than the run, and is removed again.
    """
    with finished_run(Path(config.run), whole=False) as run, ExitStack() as stack:
        work = _Export(config, run, stack)
        for target in dict.fromkeys(config.to):
            work.require(target)
        done = []
        for target in dict.fromkeys(config.to):
            done.append(work.write(target))
            _tell(done[-1], console)
        return done


class _Export:
    """One run and what is made of it on the way, once: the fused model, the GGUF, what the run itself says."""

    def __init__(self, config: ExportConfig, run: FinishedRun, stack: ExitStack):
        self.config, self.run, self._stack = config, run, stack
        self.output = Path(config.output) if config.output else run.folder / "export"
        self.name = run.folder.resolve().name
        self.source = resolve_model(run.model)
        self.tokenizer = load_tokenizer(run.trained if run.adapter is None else self.source)
        self.template = run.template(self.tokenizer)

    def require(self, target: str) -> None:
        """Before any work.

        Raises:
            UserError: it cannot be done.
        """
        if target == "peft" and self.run.adapter is None:
            raise UserError(f"{self.run.folder} has trained all weights: there is no adapter for peft. Export merged")
        if target == "mlx":
            registry.for_layout("mlx")
        if target in ("gguf", "ollama") and self._converter is None:
            require_gguf_writer()
        if target == "ollama":
            self._modelfile()
        require_free(self.folder(target), RECORD, self.config.force, keep=self.run.trained)

    def folder(self, target: str) -> Path:
        if self.config.publisher and target in ("gguf", "mlx"):
            return self.output / self.config.publisher / f"{self.name}-{target}"
        return self.output / target

    def write(self, target: str) -> Exported:
        folder = self.folder(target)
        try:
            with replacing(folder) as partial:
                TARGETS[target](self, partial)
                check = CHECKS[target](self, partial) if self.config.check else "not opened again"
                record = {"run": self.name, "base_model": self.run.model, "target": target, "check": check}
                (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder} could not be written: {error}") from error
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return Exported(target, folder, size, check)

    # What is written

    def merged(self, folder: Path) -> None:
        _link(self._merged, folder)

    def mlx(self, folder: Path) -> None:
        if self.run.adapter is None:
            _copy(self.run.trained, folder)
        else:
            adapter = self._adapter("mlx", self._temporary())
            write_fused(self.source, adapter, folder, dequantize=False, dtype=self.config.dtype)
        self._with_template(folder)

    def peft(self, folder: Path) -> None:
        adapter = self._adapter("peft", folder)
        if adapter != folder:
            _copy(adapter, folder)
        path = folder / CONFIG
        path.write_text(with_base(path.read_text(encoding="utf-8"), self.run.model), encoding="utf-8")

    def gguf(self, folder: Path) -> None:
        _link(self._gguf, folder)

    def ollama(self, folder: Path) -> None:
        self.gguf(folder)
        (folder / "Modelfile").write_text(self._modelfile(), encoding="utf-8")

    def _adapter(self, layout: Layout, folder: Path) -> Path:
        """The run's adapter in a layout: its own folder, or one that is made."""
        assert self.run.adapter is not None
        if adapter_layout(self.run.adapter) == layout:
            return self.run.adapter
        shapes = matrix_shapes(self.source)
        write_adapter(read_adapter(self.run.adapter, shapes), folder, layout, self.run.model, shapes)
        return folder

    def _with_template(self, folder: Path) -> None:
        """The chat template that the run was given belongs to what it has trained."""
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")

    def _modelfile(self) -> str:
        chat = self.run.chat()
        stops = stop_ids(self.tokenizer, self.source, self.run.trained, chat=chat)
        return modelfile(self._gguf_name, self.tokenizer, chat, stops)

    @property
    def _gguf_name(self) -> str:
        return f"{self.name}-{self.config.gguf_type}.gguf"

    @cached_property
    def _merged(self) -> Path:
        folder = self._temporary()
        if self.run.adapter is None:
            _copy(self.run.trained, folder)
        else:
            write_fused(self.source, self.run.adapter, folder, dequantize=True, dtype=self.config.dtype)
        self._with_template(folder)
        return folder

    @cached_property
    def _gguf(self) -> Path:
        """A folder with the GGUF in it."""
        folder, name = self._temporary(), self._gguf_name
        if self._converter is None:
            write_gguf(self._merged, folder / name, self.config.gguf_type, name=self.name, chat=self.run.chat())
            return folder
        words = [*self._converter, str(self._merged), "--outfile", str(folder / name)]
        done = subprocess.run([*words, "--outtype", self.config.gguf_type], capture_output=True, text=True, check=False)
        if done.returncode or not (folder / name).is_file():
            said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            raise Failed(f"llama.cpp's {Path(self._converter[-1]).name} failed: {said}")
        return folder

    @cached_property
    def _converter(self) -> list[str] | None:
        """llama.cpp's own, as a command.

        Raises:
            UserError: it is not in the folder that was named.
        """
        script = "convert_hf_to_gguf.py"
        if self.config.llama_cpp is None:
            found = shutil.which(script)
            return None if found is None else [found]
        path = Path(self.config.llama_cpp) / script
        if not path.is_file():
            raise UserError(f"llama_cpp is {self.config.llama_cpp}: expected a folder of llama.cpp with {script} in it")
        return [sys.executable, str(path)]

    def _temporary(self) -> Path:
        """Where the exports are, so that a file can be linked."""
        self.output.mkdir(parents=True, exist_ok=True)
        return Path(self._stack.enter_context(TemporaryDirectory(prefix=".making-", dir=self.output)))

    # What it says once it is opened again

    def check_model(self, folder: Path, layout: Layout | None = None) -> str:
        """Of a checkpoint folder, by a layout's backend; default: by the run's own."""
        backend = self._backend if layout is None else registry.for_layout(layout).name
        packed = quantization_of(folder) is not None
        return self._compared(backend, folder, stored=None if packed else stored_dtype(folder))

    def check_peft(self, folder: Path) -> str:
        try:
            backend = registry.for_layout("peft").name
        except UserError as error:
            shapes = matrix_shapes(self.source)
            assert self.run.adapter is not None
            _require_equal(read_adapter(self.run.adapter, shapes), read_adapter(folder, shapes))
            return f"the run's numbers; not opened by PEFT: {error}"
        return self._compared(backend, self.source, folder, stored="float32")

    def check_gguf(self, folder: Path) -> str:
        """Read by transformers, with its own tokenizer, and where it is installed by llama.cpp."""
        if absent := [name for name in ("torch", "gguf") if find_spec(name) is None]:
            return f"not opened again: that needs {' and '.join(absent)} (pip install 'bnf-align[torch,gguf]')"
        read, said = self._temporary() / "read", io.StringIO()
        import_gguf(str(folder / self._gguf_name), read, console=Console(file=said, width=10_000))
        tokenizer = load_tokenizer(read)
        for text in SAMPLES:
            theirs, ours = tokenizer(text).input_ids, self.tokenizer(text).input_ids
            if theirs != ours:
                raise Failed(f"the GGUF's tokenizer makes other tokens of {text!r}: {theirs}, and the run's {ours}")
        if tokenizer.chat_template != self._written_template:
            raise Failed("the GGUF holds another chat template than the run's")
        own, config = raw_config(self._merged), raw_config(read)
        if (own.get("rope_parameters") or {}).get("rope_type") == "llama3":  # transformers reads past its factors
            written = json.dumps(config | {"rope_parameters": own["rope_parameters"]})
            (read / "config.json").write_text(written, encoding="utf-8")
        compared = self._compared(registry.for_layout("peft").name, read, stored=self.config.gguf_type)
        beside = said.getvalue().strip().rpartition("\n")[2]
        return f"{compared}; {beside}" if beside.startswith("llama.cpp") else compared

    @property
    def _written_template(self) -> str | None:
        tokenizer = load_tokenizer(self._merged)
        return None if tokenizer.chat_template is None else str(tokenizer.get_chat_template())

    @cached_property
    def _backend(self) -> str:
        """That opens what the run has trained."""
        if self.run.adapter is not None:
            return registry.for_layout(adapter_layout(self.run.adapter)).name
        known = self.run.backend in registry.names() and not registry.missing(self.run.backend)
        return self.run.backend if known else registry.choose()

    @cached_property
    def _prompt(self) -> list[int]:
        chat = self.run.chat()
        if self.tokenizer.chat_template is None and chat.template is None:
            return prompt_ids(PROMPT, self.tokenizer, "plain")
        return prompt_ids([{"role": "user", "content": PROMPT}], self.tokenizer, "chat", chat=chat)

    @cached_property
    def _of_run(self) -> Said:
        model = self.run.trained if self.run.adapter is None else self.source
        return self._said(self._backend, model, self.run.adapter)

    def _said(self, backend: str, model: Path, adapter: Path | None, follow: list[int] | None = None) -> Said:
        engine = registry.get(backend).load(model, dtype="float32", adapter=adapter)
        (ids,) = engine.generate([self._prompt], TOKENS, [])
        batch = collate([Example(tuple(self._prompt), tuple(follow or ids), True)], 1, pad_id(self.tokenizer))
        return Said(ids, engine.evaluate(batch, np.zeros(TOKENS, np.float32)).log_odds)

    def _compared(self, backend: str, model: Path, adapter: Path | None = None, *, stored: str | None) -> str:
        """
        Args:
            stored: what weights are stored as; None: quantised once more, by which they may be off by any amount.
        Raises:
            Failed: it says otherwise than the run.
        """
        run = self._of_run
        said = self._said(backend, model, adapter, run.ids)
        off = float(np.abs(said.log_odds.astype(np.float64) - run.log_odds).mean())
        same = next((i for i, (a, b) in enumerate(zip(run.ids, said.ids, strict=True)) if a != b), TOKENS)
        line = f"{same} of {TOKENS} tokens the same, log-odds off by {off:.1e} on average"
        if stored is None:
            return f"{line}; quantised again, which rounds the update away in part"
        if not off <= BOUNDS[stored] or (same < TOKENS and BOUNDS[stored] < 0.01):
            raise Failed(
                f"what was written says otherwise than the run, and is removed again: {line}, where {stored} explains "
                f"{BOUNDS[stored]:g}"
            )
        return line


def _require_equal(ours: Adapter, theirs: Adapter) -> None:
    for path, module in ours.modules.items():
        other = theirs.modules[path]
        for a, b in ((module.a, other.a), (module.b, other.b), (module.m, other.m)):
            if not np.array_equal(a, b):  # type: ignore[arg-type]
                raise Failed(f"{path} is not what the run has trained")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _link(source: Path, target: Path) -> None:
    """The same without a second copy on the disk, where the file system can do that."""
    for path in source.rglob("*"):
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(exist_ok=True)
            continue
        try:
            os.link(path, there)
        except OSError:
            shutil.copyfile(path, there)


def _tell(done: Exported, console: Console) -> None:
    console.print(
        f"{done.target:<7} {done.folder}  {done.size:,} bytes; {done.check}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


Writer = Callable[[_Export, Path], None]
Checker = Callable[[_Export, Path], str]
TARGETS: dict[str, Writer] = {
    "merged": _Export.merged,
    "peft": _Export.peft,
    "mlx": _Export.mlx,
    "gguf": _Export.gguf,
    "ollama": _Export.ollama,
}
CHECKS: dict[str, Checker] = {
    "merged": _Export.check_model,
    "peft": _Export.check_peft,
    "mlx": lambda work, folder: work.check_model(folder, "mlx"),
    "gguf": _Export.check_gguf,
    "ollama": _Export.check_gguf,
}

Config = ExportConfig
POSITIONAL = ("--run",)


def backends(config: ExportConfig) -> list[str]:
    """The run's own, and MLX's where that is asked for."""
    recorded = recorded_setting(Path(config.run), "hardware.backend")
    wanted = [recorded if recorded in registry.names() else registry.choose()]
    if "mlx" in config.to:
        wanted.append(registry.for_layout("mlx").name)
    return [name for name in dict.fromkeys(wanted) if not registry.missing(name)]


def run(config: ExportConfig, console: Console) -> int:
    export(config, console)
    return 0
