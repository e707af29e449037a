"""Feedback as tokens, by one set of settings, for every job that reads data: all in memory, or as a stream."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnf_core.config import Template
from bnf_core.data.records import Feedback
from bnf_core.data.streaming import FeedbackStream
from bnf_core.data.tokenization import Tokenized, tokenize
from bnf_core.types import Example, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class FeedbackTokenizer:
    """A tokenizer and how rows go through it; see `tokenize`."""

    tokenizer: "Tokenizer"
    template: Template
    max_length: int
    skip_bad_rows: bool

    def __call__(self, rows: Sequence[Feedback]) -> Tokenized:
        """Rows that `sources.load_feedback` has read, as examples with counts of what was cut and skipped.

        Raises:
            UserError: a bad row, unless they are to be skipped, or no good one.
        """
        return self._tokenize(rows, self.skip_bad_rows)

    def stream(
        self,
        source: str | Iterable[Mapping[str, Any]],
        split: str,
        *,
        shuffle_buffer: int,
        seed: int,
        unit: Unit = "row",
        report: Callable[[Tokenized], None] | None = None,
    ) -> FeedbackStream:
        """Rows that are read and tokenised as they are needed; the stream counts those that it skips.

        Args:
            source, split, shuffle_buffer, seed, unit: as for FeedbackStream.
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
        )

    def cuts(self, tokens: Tokenized) -> str | None:
        """What was cut, for a person; None: nothing."""
        if not tokens.prompts_cut and not tokens.completions_cut:
            return None
        return (
            f"longer than {self.max_length} tokens: {tokens.prompts_cut:,} prompts cut from the left, "
            f"{tokens.completions_cut:,} completions from the right"
        )

    def _tokenize(self, rows: Sequence[Feedback], skip_bad_rows: bool) -> Tokenized:
        return tokenize(
            rows, self.tokenizer, template=self.template, max_length=self.max_length, skip_bad_rows=skip_bad_rows
        )
