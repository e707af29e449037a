"""A judge that is a model of transformers with one output: a reward model."""

from pathlib import Path
from typing import Any

from bnf_align.judges.base import Judge, Row
from bnf_core.data.messages import Text
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model


def reward_model(model: str, device: str = "cpu", max_length: int = 2048) -> Judge:
    """The score that a sequence-classification checkpoint gives to prompt and completion, through its chat template
    where it has one.

    Raises:
        UserError: there is no such checkpoint, it has more than one output, or PyTorch is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise UserError("judge reward-model needs PyTorch: pip install 'bnf-align[torch]'") from error
    folder = resolve_model(model)
    tokenizer = load_tokenizer(Path(folder))
    try:
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"judge reward-model: {model} cannot be loaded on {device}: {error}") from error
    if classifier.config.num_labels != 1:
        raise UserError(f"judge reward-model: {model} has {classifier.config.num_labels} outputs, expected one")
    classifier.eval()

    def judge(prompt: Text, completion: str, row: Row) -> float:
        if isinstance(prompt, str) and not tokenizer.chat_template:
            ids = tokenizer(prompt + completion)["input_ids"]
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [*messages, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return float(classifier(torch.tensor([ids[-max_length:]], device=device)).logits[0, 0])

    return judge
