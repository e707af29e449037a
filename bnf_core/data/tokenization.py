"""From feedback to token ids: where the prompt ends and the completion begins, exactly, and which end-of-turn
token is trained.

The boundary is found by tokenising the prompt alone and the prompt with its completion: what both begin with is
the prompt. Tokenising the completion alone would be wrong wherever the tokenizer merges across the boundary,
as " " and "Paris" into " Paris".
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bnf_core.config import Template
from bnf_core.data.records import Feedback, Message, RowError, Text, common_length
from bnf_core.data.sources import pair_number, prompt_group
from bnf_core.errors import UserError
from bnf_core.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHUNK = 1000  # rows tokenised in one call, which fast tokenizers spread over the cores


@dataclass(frozen=True)
class Tokenized:
    examples: list[Example]
    prompts_cut: int  # rows whose prompt lost its beginning
    completions_cut: int  # rows whose completion, too long by itself, lost its end
    skipped: list[str]  # the message of every bad row, when they are to be skipped


def tokenize(
    rows: Sequence[Feedback],
    tokenizer: "Tokenizer",
    *,
    template: Template = "auto",
    max_length: int,
    skip_bad_rows: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """Tokenise rows of feedback, in order.

    A row longer than `max_length` loses the beginning of its prompt, all but BOS, and only if the completion
    alone is longer than `max_length` − 1 the end of its completion, the end-of-turn token included.

    Args:
        rows: checked feedback.
        tokenizer: a transformers tokenizer with an EOS token.
        template: `auto`: messages through the chat template, plain text verbatim; `chat`: both through the
            template, plain text as one user's and one assistant's message; `plain`: no template, no messages.
        max_length: most tokens of prompt and completion together, at least 2.
        skip_bad_rows: list the rows that cannot be tokenised in `skipped` instead of stopping at the first.
        progress: called with the number of rows done and of all rows.
    Raises:
        RowError: the chat template refuses a row, or no token of its prompt or completion is left.
        UserError: the tokenizer lacks an EOS token or the chat template that the rows need.
    """
    if max_length < 2:
        raise UserError(f"data.max_length is {max_length}: expected at least 2, a token each of prompt and completion")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so completions would never end. Set eos_token in tokenizer_config.json."
        )
    added, turn_ends = _added_before(tokenizer), _special_ids(tokenizer)
    examples: list[Example] = []
    skipped: list[str] = []
    prompts_cut = completions_cut = 0
    for at in range(0, len(rows), CHUNK):
        chunk: list[tuple[int, _Rendered]] = []
        for i in range(at, min(at + CHUNK, len(rows))):
            try:
                chunk.append((i, _render(rows[i], tokenizer, template, added)))
            except RowError as error:
                _skip(error, skipped, skip_bad_rows)
        ids = _encode([text for _, r in chunk for text in (r.prompt, r.whole)], tokenizer)
        for i, rendered in chunk:
            try:
                prompt, completion = _split(rendered, ids, tokenizer, turn_ends, rows[i].source)
            except RowError as error:
                _skip(error, skipped, skip_bad_rows)
                continue
            short_prompt, short_completion = _cut(prompt, completion, max_length, tokenizer.bos_token_id)
            prompts_cut += len(short_prompt) < len(prompt)
            completions_cut += len(short_completion) < len(completion)
            group = prompt_group(rows[i].prompt)
            pair = pair_number(rows[i].source) if rows[i].paired else 0
            examples.append(
                Example(tuple(short_prompt), tuple(short_completion), rows[i].label, group, pair, rows[i].source)
            )
        if progress is not None:
            progress(min(at + CHUNK, len(rows)), len(rows))
    if skipped and not examples:
        raise UserError(f"none of the {len(rows)} rows can be tokenised; the first: {skipped[0]}")
    return Tokenized(examples, prompts_cut, completions_cut, skipped)


def prompt_ids(prompt: Text, tokenizer: "Tokenizer", template: Template = "auto", source: str = "prompt") -> list[int]:
    """Token ids from which to generate a completion, as `tokenize` would begin the row; never cut.

    Args:
        prompt: plain text or messages.
        tokenizer: a transformers tokenizer.
        template: as for `tokenize`.
        source: what to call the prompt in messages.
    Raises:
        UserError: as for `tokenize`.
    """
    if _needs_template(prompt, tokenizer, template, source):
        text, leading = _chat(_messages(prompt, "user"), tokenizer, source, open_turn=True), []
    else:
        text = str(prompt)
        leading = _leading_ids(text, not text, tokenizer, _added_before(tokenizer))
    ids = leading + _encode([text], tokenizer)[text]
    if not ids:
        raise _no_prompt(source, text)
    return ids


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


def stop_ids(tokenizer: "Tokenizer", folder: Path) -> list[int]:
    """The token ids that end a generated completion: EOS, then those of generation_config.json in the folder.

    Raises:
        UserError: generation_config.json is not JSON, or its eos_token_id is no token id.
    """
    path = folder / "generation_config.json"
    listed: Any = []
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a JSON object: {error}. Mend or remove it.") from error
    listed = listed if isinstance(listed, list) else [listed]
    if not all(isinstance(i, int) for i in listed):
        raise UserError(f"{path}: eos_token_id is {listed}: expected a token id or a list of them")
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys(eos + listed))


# Text


class _Rendered(NamedTuple):
    """A row as text, before tokenisation."""

    prompt: str
    whole: str  # prompt and completion
    templated: bool
    leading: list[int]  # ids put before both


def _render(row: Feedback, tokenizer: "Tokenizer", template: Template, added: list[int]) -> _Rendered:
    templated = _needs_template(row.prompt, tokenizer, template, row.source)
    if templated:
        messages = _messages(row.prompt, "user")
        prompt = _chat(messages, tokenizer, row.source, open_turn=True)
        whole = _chat(messages + _messages(row.completion, "assistant"), tokenizer, row.source, open_turn=False)
        # A template may write the opened turn otherwise than a finished one, but never the turns before it.
        if messages[-1]["content"].strip() not in whole[: common_length(prompt, whole)]:
            raise RowError(
                row.source,
                "prompt",
                "the chat template writes it differently once a completion follows, expected the same beginning",
                "Check the order of the roles, or give the row as plain text",
            )
    else:
        prompt, whole = str(row.prompt), str(row.prompt) + str(row.completion)
    leading = [] if templated else _leading_ids(whole, not prompt, tokenizer, added)
    return _Rendered(prompt, whole, templated, leading)


def _needs_template(prompt: Text, tokenizer: "Tokenizer", template: Template, source: str) -> bool:
    if isinstance(prompt, str) and template != "chat":
        return False
    if template == "plain":
        raise RowError(
            source, "prompt", "is a list of messages, expected plain text", "Set data.template to auto or chat"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"{source}: the tokenizer has no chat template, which messages and data.template=chat need. Take the "
            "instruction-tuned model or its chat_template.jinja, or give prompts and completions as plain text."
        )
    return True


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _chat(messages: list[Message], tokenizer: "Tokenizer", source: str, open_turn: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RowError(
            source,
            "prompt",
            f"the chat template refuses the roles {roles}: {error}",
            "Give the roles that the model's template asks for, in its order",
        ) from error


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


def _special_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    """Tokens that can end a turn: the special ones, whether or not they have a role such as EOS."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return frozenset(special | {tokenizer.eos_token_id})  # some tokenizers use one token as both


def _split(
    rendered: _Rendered,
    ids: dict[str, list[int]],
    tokenizer: "Tokenizer",
    turn_ends: Collection[int],
    source: str,
) -> tuple[list[int], list[int]]:
    """Prompt and completion of one row, the end of turn included."""
    alone, whole = ids[rendered.prompt], ids[rendered.whole]
    size = common_length(alone, whole)
    prompt, completion = rendered.leading + whole[:size], whole[size:]
    if not prompt:
        raise _no_prompt(source, rendered.prompt)
    if not completion:
        raise RowError(
            source, "completion", "no token of it is left after tokenisation, expected at least one", "Drop the row"
        )
    if rendered.templated:
        end = _turn_end(completion, tokenizer, turn_ends)
        return prompt, completion[:end] if end else [*completion, int(tokenizer.eos_token_id)]
    return prompt, completion if completion[-1] == tokenizer.eos_token_id else [*completion, tokenizer.eos_token_id]


def _turn_end(completion: list[int], tokenizer: "Tokenizer", turn_ends: Collection[int]) -> int:
    """How many tokens there are up to and with the end-of-turn token that only whitespace follows; 0: none."""
    for size in range(len(completion), 0, -1):
        token = completion[size - 1]
        if token in turn_ends:
            return size
        if str(tokenizer.decode([token])).strip():
            return 0
    return 0


def _cut(prompt: list[int], completion: list[int], max_length: int, bos: int | None) -> tuple[list[int], list[int]]:
    completion = completion[: max_length - 1]
    room = max_length - len(completion)
    if len(prompt) > room:
        kept = 1 if room > 1 and prompt[0] == bos else 0
        prompt = prompt[:kept] + prompt[len(prompt) - (room - kept) :]
    return prompt, completion


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
