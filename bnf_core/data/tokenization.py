"""From feedback to token ids: where the prompt ends and the completion begins, exactly, and which end-of-turn
token is trained.

The boundary is found by tokenising the prompt alone and the prompt with its completion: what both begin with is
the prompt. Tokenising the completion alone would be wrong wherever the tokenizer merges across the boundary,
as " " and "Paris" into " Paris".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bnf_core.config import Template
from bnf_core.data.messages import RowError, Text, Tool
from bnf_core.data.records import Feedback, common_length
from bnf_core.data.rendering import Chat, Rendered, Renderer
from bnf_core.data.sources import group_of, pair_number
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file
from bnf_core.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHUNK = 1000  # rows tokenised in one call, which fast tokenizers spread over the cores


class Fate(IntFlag):
    """What became of a row as it was tokenised."""

    PROMPT_CUT = 1  # its prompt lost its beginning
    COMPLETION_CUT = 2  # its completion, too long by itself, lost its end
    REOPENED = 4  # its turn is opened by the template otherwise than a finished one is written
    VERBATIM = 8  # plain text, and no template


@dataclass(frozen=True)
class Tokenized:
    examples: list[Example]
    fates: list[Fate]  # of each
    skipped: list[str]  # the message of every bad row, when they are to be skipped
    unused: frozenset[str] = frozenset()  # keys of messages and arguments of the template that it does not write

    @property
    def prompts_cut(self) -> int:
        return self._count(Fate.PROMPT_CUT)

    @property
    def completions_cut(self) -> int:
        return self._count(Fate.COMPLETION_CUT)

    @property
    def reopened(self) -> int:
        return self._count(Fate.REOPENED)

    def _count(self, fate: Fate) -> int:
        return sum(fate in of_row for of_row in self.fates)


def tokenize(
    rows: Sequence[Feedback],
    tokenizer: "Tokenizer",
    *,
    template: Template = "auto",
    chat: Chat | None = None,
    max_length: int,
    skip_bad_rows: bool = False,
) -> Tokenized:
    """Tokenise rows of feedback, in order.

    A row longer than `max_length` loses the beginning of its prompt, all but BOS, and only if the completion
    alone is longer than `max_length` − 1 the end of its completion, the end-of-turn token included.

    Args:
        rows: checked feedback.
        tokenizer: a transformers tokenizer with an EOS token.
        template: `auto`: messages through the chat template, plain text verbatim; `chat`: both through the
            template, plain text as one user's and one assistant's message; `plain`: no template, no messages.
        chat: which chat template, with what; default: the tokenizer's.
        max_length: most tokens of prompt and completion together, at least 2.
        skip_bad_rows: list the rows that cannot be tokenised in `skipped` instead of stopping at the first.
    Raises:
        RowError: the chat template refuses a row or leaves out a part of it, or no token of its prompt or completion
            is left.
        UserError: the tokenizer lacks an EOS token or the chat template that the rows need.
    """
    whole, unused = Tokenized([], [], []), frozenset[str]()
    for at in range(0, max(len(rows), 1), CHUNK):
        part = tokenize_some(rows[at : at + CHUNK], tokenizer, template, chat, max_length, skip_bad_rows)
        whole.examples.extend(part.examples)
        whole.fates.extend(part.fates)
        whole.skipped.extend(part.skipped)
        unused |= part.unused
    if whole.skipped and not whole.examples:
        raise none_left(len(rows), whole.skipped[0])
    return replace(whole, unused=unused)


def tokenize_some(
    rows: Sequence[Feedback],
    tokenizer: "Tokenizer",
    template: Template,
    chat: Chat | None,
    max_length: int,
    skip_bad_rows: bool,
) -> Tokenized:
    """As `tokenize`, for no more rows than fit into memory; none may be left."""
    if max_length < 2:
        raise UserError(f"data.max_length is {max_length}: expected at least 2, a token each of prompt and completion")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so completions would never end. Set eos_token in tokenizer_config.json."
        )
    added, renderer = _added_before(tokenizer), Renderer(tokenizer, template, chat)
    tokens = Tokenized([], [], [])
    texts: list[tuple[Feedback, Rendered | None]] = []
    for row in rows:
        try:
            texts.append((row, None if _drawn_here(row, renderer, tokenizer) else renderer.row(row)))
        except RowError as error:
            _skip(error, tokens.skipped, skip_bad_rows)
    ids = _encode([text for _, rendered in texts if rendered for text in _texts(rendered)], tokenizer)
    for row, rendered in texts:
        try:
            if rendered is None:
                assert row.ids is not None
                whole = _Tokens(list(row.ids.prompt), list(row.ids.completion), None)
            else:
                whole = _split(rendered, ids, tokenizer, added, row.source)
            cut = _cut(whole, max_length, tokenizer.bos_token_id, row.source)
        except RowError as error:
            _skip(error, tokens.skipped, skip_bad_rows)
            continue
        tokens.fates.append(
            (Fate.PROMPT_CUT if len(cut.prompt) < len(whole.prompt) else Fate(0))
            | (Fate.COMPLETION_CUT if len(cut.completion) < len(whole.completion) else Fate(0))
            | (Fate.REOPENED if rendered is not None and rendered.reopened else Fate(0))
            | (Fate(0) if rendered is None or rendered.templated else Fate.VERBATIM)
        )
        tokens.examples.append(
            Example(
                tuple(cut.prompt),
                tuple(cut.completion),
                row.label,
                group=group_of(row),
                pair=pair_number(row.source) if row.paired else 0,
                source=row.source,
                trained=None if cut.trained is None else tuple(cut.trained),
                weight=row.weight,
            )
        )
    return replace(tokens, unused=frozenset(renderer.unused))


def none_left(count: int, first: str) -> UserError:
    return UserError(f"none of the {count} rows can be tokenised; the first: {first}")


def prompt_ids(
    prompt: Text,
    tokenizer: "Tokenizer",
    template: Template = "auto",
    source: str = "prompt",
    chat: Chat | None = None,
    tools: list[Tool] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids from which to generate a completion, as `tokenize` would begin the row; never cut.

    Args:
        prompt: plain text or messages.
        tokenizer: a transformers tokenizer.
        template: as for `tokenize`.
        source: what to call the prompt in messages.
        chat: as for `tokenize`.
        tools, kwargs: what the chat template is given besides.
    Raises:
        UserError: as for `tokenize`.
    """
    return _prompt_ids(Renderer(tokenizer, template, chat), tokenizer, prompt, source, tools, kwargs)


def _prompt_ids(
    renderer: Renderer,
    tokenizer: "Tokenizer",
    prompt: Text,
    source: str,
    tools: list[Tool] | None,
    kwargs: Mapping[str, Any] | None,
) -> list[int]:
    text, templated = renderer.prompt(prompt, source, tools, kwargs)
    leading = [] if templated else _leading_ids(text, not text, tokenizer, _added_before(tokenizer))
    ids = leading + _encode([text], tokenizer)[text]
    if not ids:
        raise _no_prompt(source, text)
    return ids


def _drawn_here(row: Feedback, renderer: Renderer, tokenizer: "Tokenizer") -> bool:
    """Whether a row has the tokens that a model drew, and this tokenizer and chat template make the same of its prompt.
    Then what was drawn is trained: its text may well have other tokens. Otherwise the text is."""
    if row.ids is None:
        return False
    ids = _prompt_ids(renderer, tokenizer, row.prompt, row.source, row.tools, row.template_kwargs)
    return tuple(ids) == row.ids.prompt


def load_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer saved in a checkpoint folder, with its chat template; no code from the folder is run.

    Raises:
        UserError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected a checkpoint with its tokenizer.json.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a missing file, a broken one, a class that needs remote code: each raises its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder}: no tokenizer that can be loaded ({reason}). Expected tokenizer.json and "
            "tokenizer_config.json: copy them from the original model."
        ) from error
    return tokenizer


def pad_id(tokenizer: "Tokenizer") -> int:
    """Any id will do: padding is never scored and never seen by a scored token."""
    return int(tokenizer.pad_token_id or 0)


def stop_ids(tokenizer: "Tokenizer", *folders: Path, chat: Chat | None = None, of_template: bool = True) -> list[int]:
    """The token ids that end a generated completion: EOS, what ends a turn under the chat template, and those of
    generation_config.json in the folders: of a model, and of an adapter.

    Args:
        chat: which chat template, with what; default: the tokenizer's.
        of_template: whether to ask it.
    Raises:
        UserError: generation_config.json is not JSON, or its eos_token_id is no token id.
    """
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if of_template and (end := Renderer(tokenizer, chat=chat).turn_end()) is not None:
        stops.append(tokenizer.get_vocab()[end])
    for folder in folders:
        stops += listed_stops(folder)
    return list(dict.fromkeys(stops))


GENERATION_CONFIG = "generation_config.json"


def listed_stops(folder: Path) -> list[int]:
    """Those of generation_config.json in a folder, if it is there.

    Raises:
        UserError: it is not JSON, or its eos_token_id is no token id.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return []
    try:
        listed: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object: {error}. Mend or remove it.") from error
    stops: list[int] = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(isinstance(i, int) for i in stops):
        raise UserError(f"{path}: eos_token_id is {stops}: expected a token id or a list of them")
    return stops


def save_stops(folder: Path, stops: Sequence[int]) -> None:
    """Write them into a folder's generation_config.json, beside what it says of other things: transformers and mlx-lm
    stop there too.

    Raises:
        OSError: the file cannot be written.
        UserError: it is not JSON.
    """
    path = folder / GENERATION_CONFIG
    if sorted(listed_stops(folder)) == sorted(stops):
        return
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    replace_file(path, json.dumps(settings | {"eos_token_id": list(stops)}, indent=2) + "\n")


# Tokens


def _encode(texts: Sequence[str], tokenizer: "Tokenizer") -> dict[str, list[int]]:
    """Token ids by text, without the special tokens that the tokenizer would add itself: a template has written
    its own, BOS comes from `_leading_ids`, and an EOS behind the prompt alone would hide the boundary."""
    unique = list(dict.fromkeys(texts))  # the prompts of pairs come twice
    if not unique:
        return {}
    encoded = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return dict(zip(unique, encoded["input_ids"], strict=True))


def _added_before(tokenizer: "Tokenizer") -> list[int]:
    """The special tokens that the tokenizer itself puts before any text, such as BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:at])


def _leading_ids(text: str, prompt_is_empty: bool, tokenizer: "Tokenizer", added: list[int]) -> list[int]:
    """What to put before plain text: the tokenizer's own special tokens, unless the text begins with BOS."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return []
    if prompt_is_empty and not added and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)]  # something must predict the first token
    return added


class _Tokens(NamedTuple):
    prompt: list[int]
    completion: list[int]
    trained: list[bool] | None  # of the completion; None: all


def _texts(rendered: Rendered) -> list[str]:
    """What has to be tokenised of one row: besides itself all that it begins with where something else begins."""
    edges = [edge for turn in rendered.turns for edge in turn]
    return [rendered.prompt, rendered.whole, *(rendered.whole[:edge] for edge in edges)]


def _split(
    rendered: Rendered, ids: dict[str, list[int]], tokenizer: "Tokenizer", added: list[int], source: str
) -> _Tokens:
    """Prompt and completion of one row, the end of turn included."""
    whole, eos = ids[rendered.whole], int(tokenizer.eos_token_id)

    def shared(text: str) -> int:
        return common_length(ids[text], whole)

    size = shared(rendered.prompt)
    leading = [] if rendered.templated else _leading_ids(rendered.whole, not rendered.prompt, tokenizer, added)
    prompt, completion = leading + whole[:size], whole[size:]
    if not prompt:
        raise _no_prompt(source, rendered.prompt)
    if not completion:
        raise RowError(
            source, "completion", "no token of it is left after tokenisation, expected at least one", "Drop the row"
        )
    trained: list[bool] | None = None
    if rendered.turns:
        trained = [False] * len(completion)
        for turn in rendered.turns:
            begin, end = (shared(rendered.whole[:edge]) - size for edge in turn)
            trained[begin:end] = [True] * (end - begin)
    if not (rendered.ended if rendered.templated else completion[-1] == eos):
        completion = [*completion, eos]
        if trained is not None:
            trained.append(rendered.turns[-1].end == len(rendered.whole))
    return _Tokens(prompt, completion, None if trained is None or all(trained) else trained)


def _cut(whole: _Tokens, max_length: int, bos: int | None, source: str) -> _Tokens:
    prompt, completion, trained = whole
    completion, trained = completion[: max_length - 1], None if trained is None else trained[: max_length - 1]
    if trained is not None:
        if not any(trained):
            raise RowError(
                source,
                "completion",
                f"none of its first {max_length - 1} tokens is to be trained, expected at least one",
                "Raise data.max_length, train another turn, or drop the row",
            )
        if all(trained):
            trained = None
    room = max_length - len(completion)
    if len(prompt) > room:
        kept = 1 if room > 1 and prompt[0] == bos else 0
        prompt = prompt[:kept] + prompt[len(prompt) - (room - kept) :]
    return _Tokens(prompt, completion, trained)


def _no_prompt(source: str, text: str) -> RowError:
    if text:
        problem = "its first token runs on into the completion, expected one whole token of prompt"
        return RowError(source, "prompt", problem, "End the prompt with a space or a newline")
    problem = "is empty, expected at least one token, because this tokenizer has no BOS token to stand for it"
    return RowError(source, "prompt", problem, "Write a prompt, even a newline")


def _skip(error: RowError, skipped: list[str], skip_bad_rows: bool) -> None:
    if not skip_bad_rows:
        raise error
    skipped.append(str(error))
