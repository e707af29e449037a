"""Prompts and scores of reasoning-gym: generators of a hundred verifiable tasks."""

from functools import lru_cache
from typing import Any

from bnf_align.judges.base import Judge, Row, answer_of
from bnf_core.data.messages import Text
from bnf_core.data.prompts import Prompt
from bnf_core.errors import UserError

PREFIX = "reasoning-gym:"
ASK = "\n\nGive the final answer between <answer> and </answer>."


def gym_prompts(name: str, settings: dict[str, Any], seed: int) -> list[Prompt]:
    """Tasks of one generator, each a user's message.

    Args:
        name: of a generator of reasoning-gym, such as chain_sum.
        settings: of the generator, and `size`, how many tasks.
        seed: of the tasks.
    Raises:
        UserError: the package is not installed, or there is no such generator or setting.
    """
    gym = _gym()
    try:
        tasks = list(gym.create_dataset(name, **({"size": 500, "seed": seed} | settings)))
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"prompts {PREFIX}{name}: {error}") from error
    return [
        Prompt(
            [{"role": "user", "content": task["question"] + ASK}], {**task, "generator": name}, f"{PREFIX}{name}:{n}"
        )
        for n, task in enumerate(tasks, 1)
    ]


def reasoning_gym() -> Judge:
    """The score, from 0 to 1, that the generator of a task gives to the answer between <answer> and </answer>."""
    gym = _gym()
    from reasoning_gym.utils import extract_answer

    scorer = lru_cache(gym.get_score_answer_fn)

    def judge(prompt: Text, completion: str, row: Row) -> float:
        return float(scorer(answer_of(row, "generator"))(extract_answer(completion), dict(row)))

    return judge


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError("reasoning-gym is not installed: pip install 'bnf-align[tasks]'") from error
    return reasoning_gym
