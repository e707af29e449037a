"""Prompts with completions of other prompts: rows that no one has written, which KTO's z₀ is the mean reward of."""

from collections.abc import Iterable, Sequence

from bnf_core.objectives import Objective
from bnf_core.types import Example


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Each prompt with the completion of the next row that has another prompt, the first row following the last; none
    where all rows have one prompt. Rows that were given theirs by `batching.Rows`, where the next row of the data is
    known, keep it."""
    given = [e.mismatched for e in examples if e.mismatched is not None]
    if given:
        return given
    longest = max(map(len, examples), default=0)
    return [row for i in range(len(examples)) if (row := mismatched_row(examples, i, longest)) is not None]


def mismatched_row(examples: Sequence[Example], i: int, longest: int) -> Example | None:
    """Of the example `i`. Where the other completion makes it longer than `longest`, the prompt loses its beginning."""
    prompt = examples[i].prompt_ids
    after = (examples[(i + k) % len(examples)] for k in range(1, len(examples)))
    other = next((e for e in after if e.prompt_ids != prompt), None)
    if other is None:
        return None
    room = longest - len(other.completion_ids)
    return Example(prompt[-room:], other.completion_ids, True, trained=other.trained)


def once(examples: Iterable[Example]) -> list[Example]:
    """Without repetitions: the rows of a pair have one mismatched row between them."""
    return list({example.key: example for example in examples}.values())


def with_mismatched(examples: Iterable[Example], objective: Objective) -> list[Example]:
    """All rows whose reference an objective asks for in learning from these."""
    rows = list(examples)
    return rows + once(mismatched(rows)) if objective.baseline_from == "mismatched" else rows


def unknown_before(objective: str) -> str:
    """Why nothing can compute their reference where all weights are trained and the rows are streamed."""
    return (
        f"{objective} with all weights trained compares with mismatched rows, whose reference has to be computed "
        "before the first step, and of streamed data they are not known by then: train an adapter, or without streaming"
    )
