"""What a model can be given: token ids that it knows, and as many tokens in a row as it has positions for.
Beyond either a framework stops with an error of its own, or reads whatever lies there in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from bnf_core.errors import UserError
from bnf_core.sampling import Completion
from bnf_core.types import Batch


@dataclass(frozen=True)
class Limits:
    vocabulary: int  # how many token ids there are
    positions: int | None = None  # in its table; None: they are computed, as many as one likes

    def require(self, batch: Batch) -> None:
        """Raises UserError where a batch goes beyond them."""
        self._require_known(max((int(ids.max()) for ids in (batch.input_ids, batch.targets) if ids.size), default=0))
        longest = int(batch.lengths.max(initial=0))
        if self.positions is not None and longest > self.positions:
            raise UserError(too_long("the data", longest, self.positions))

    def require_rows(self, rows: Sequence[Completion]) -> None:
        """Raises UserError where prompts, or what is generated after them, go beyond them."""
        self._require_known(max((max(row.prompt_ids) for row in rows), default=0))
        longest = max(rows, key=lambda row: len(row.prompt_ids) + row.max_tokens)
        prompt = len(longest.prompt_ids)
        if self.positions is not None and prompt + longest.max_tokens > self.positions:
            raise UserError(
                f"{longest.max_tokens} tokens after a prompt of {prompt} do not fit into the {self.positions} "
                f"positions of the model: generate at most {max(self.positions - prompt, 0)}"
            )

    def _require_known(self, largest: int) -> None:
        if largest >= self.vocabulary:
            raise UserError(
                f"the data holds token id {largest}, and the model knows ids below {self.vocabulary}: the tokenizer is "
                "that of another model, or has tokens that were added to it and not to the model. Give the model's own "
                "tokenizer"
            )


def too_long(where: str, tokens: int, positions: int) -> str:
    """What to say of a row that has too many tokens."""
    return (
        f"{where}: a row has {tokens} tokens, and the model has {positions} positions: set data.max_length "
        f"to at most {positions}, which cuts the prompt"
    )
