"""Feedback as tokens, by one set of settings, for every job that reads data: all in memory, or as a stream."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bnf_core.config import DataConfig, Template, Where
from bnf_core.data.cores import on_all_cores, workers_for
from bnf_core.data.reading import Reading
from bnf_core.data.records import Feedback
from bnf_core.data.rendering import Chat, chat_of
from bnf_core.data.sources import LoadedFeedback, group_of
from bnf_core.data.streaming import FeedbackStream
from bnf_core.data.table import About, ExampleTable, Part, part_of
from bnf_core.data.token_cache import Making
from bnf_core.data.tokenization import CHUNK, Fate, Tokenized, none_left, tokenize, tokenize_some
from bnf_core.types import Example, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Tally:
    """What became of rows as they were tokenised, for a person: counts grow as rows are met."""

    max_length: int
    rows: int = 0
    chosen: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0
    reopened: int = 0
    unused: set[str] = field(default_factory=set)  # keys of messages that the chat template does not write
    neither: int = 0  # left out, because their label or weight is 0

    def add(self, tokens: Tokenized) -> None:
        self.rows += len(tokens.examples)
        self.chosen += sum(e.label for e in tokens.examples)
        self.prompts_cut += tokens.prompts_cut
        self.completions_cut += tokens.completions_cut
        self.reopened += tokens.reopened
        self.unused |= tokens.unused

    def add_table(self, table: ExampleTable) -> None:
        fates = table.column("fates")
        self.rows += len(table)
        self.chosen += int(np.count_nonzero(table.column("labels") > 0))
        self.prompts_cut += int(np.count_nonzero(fates & Fate.PROMPT_CUT))
        self.completions_cut += int(np.count_nonzero(fates & Fate.COMPLETION_CUT))
        self.reopened += int(np.count_nonzero(fates & Fate.REOPENED))

    def notes(self, whole: bool = True) -> list[str]:
        """What a person should know; none: all is well.

        Args:
            whole: whether these are all the rows there are.
        """
        notes = []
        if self.prompts_cut or self.completions_cut:
            notes.append(
                f"longer than {self.max_length} tokens: {self.prompts_cut:,} prompts cut from the left, "
                f"{self.completions_cut:,} completions from the right"
            )
        if self.neither:
            notes.append(
                f"{self.neither:,} completions are left out: a label or weight of 0 says neither chosen nor rejected"
            )
        if self.unused:
            notes.append(
                f"the chat template does not use what the rows or settings give it: {', '.join(sorted(self.unused))}"
            )
        if self.reopened:
            notes.append(
                f"{self.reopened:,} completions follow the turn as generation opens it, which the chat template writes "
                "otherwise once it is finished"
            )
        if whole and self.rows and self.chosen in (0, self.rows):
            notes.append(
                f"every completion is {'chosen' if self.chosen else 'rejected'}: nothing shows the model what to "
                f"{'avoid' if self.chosen else 'prefer'}"
            )
        return notes


@dataclass(frozen=True)
class FeedbackTokenizer:
    """A tokenizer and how rows go through it; see `tokenize`."""

    tokenizer: "Tokenizer"
    template: Template
    max_length: int
    skip_bad_rows: bool
    chat: Chat = field(default_factory=Chat)
    reading: Reading = field(default_factory=Reading)

    @classmethod
    def of(cls, tokenizer: "Tokenizer", config: DataConfig) -> "FeedbackTokenizer":
        """As the settings say.

        Raises:
            UserError: `data.chat_template` is a file that cannot be read, or `data.label` no rule.
        """
        chat, reading = chat_of(config), Reading.of(config)
        return cls(tokenizer, config.template, config.max_length, config.skip_bad_rows, chat, reading)

    def __call__(self, rows: Sequence[Feedback]) -> Tokenized:
        """Rows that `sources.load_feedback` has read, as examples with counts of what was cut and skipped.

        Raises:
            UserError: a bad row, unless they are to be skipped, or no good one.
        """
        return self._tokenize(rows, self.skip_bad_rows)

    def making(self, loaded: LoadedFeedback, workers: int | None = None) -> Making:
        """The same as what a table is made of, on all cores.

        Args:
            workers: how many processes tokenise; default: one for so many rows as are worth starting it.
        """
        about = About(loaded.shape, list(loaded.skipped), sorted(loaded.unused), neither=loaded.neither)
        return Making(list(map(group_of, loaded.rows)), self._parts(loaded.rows, about.skipped, workers), about)

    def _parts(self, rows: Sequence[Feedback], skipped: list[str], workers: int | None) -> Iterator[Part]:
        chunks = (rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK))
        left = 0
        for part, bad in on_all_cores(self._part, chunks, workers_for(len(rows)) if workers is None else workers):
            skipped += bad
            left += len(part.arrays["ends"])
            yield part
        if not left:
            raise none_left(len(rows), skipped[-1])

    def _part(self, rows: Sequence[Feedback]) -> tuple[Part, list[str]]:
        tokens = tokenize_some(rows, self.tokenizer, self.template, self.chat, self.max_length, self.skip_bad_rows)
        return part_of(tokens), tokens.skipped

    def stream(
        self,
        source: str | Where | Iterable[Mapping[str, Any]],
        split: str,
        *,
        shuffle_buffer: int,
        seed: int,
        unit: Unit = "row",
        report: Callable[[Tokenized], None] | None = None,
        labelled: bool = True,
    ) -> FeedbackStream:
        """Rows that are read and tokenised as they are needed; the stream counts those that it skips.

        Args:
            source, split, shuffle_buffer, seed, unit, labelled: as for FeedbackStream.
            report: called with what each batch of rows gave.
        Raises:
            UserError: nothing there, or no such split.
        """

        def examples(rows: list[Feedback]) -> list[Example]:
            tokens = self._tokenize(rows, False)  # the stream itself skips, and needs an example for each row
            if report is not None:
                report(tokens)
            return tokens.examples

        return FeedbackStream(
            source,
            split,
            examples,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
            skip_bad_rows=self.skip_bad_rows,
            unit=unit,
            reading=self.reading,
            labelled=labelled,
        )

    def tally(self, *tokens: Tokenized) -> Tally:
        """Of these, to which more can be added."""
        tally = Tally(self.max_length)
        for some in tokens:
            tally.add(some)
        return tally

    def _tokenize(self, rows: Sequence[Feedback], skip_bad_rows: bool) -> Tokenized:
        return tokenize(
            rows,
            self.tokenizer,
            template=self.template,
            chat=self.chat,
            max_length=self.max_length,
            skip_bad_rows=skip_bad_rows,
        )
