"""Prompts to token ids, and which token ends an output: the same for the engine and for calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, cast

from knn_ssd.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
PromptLike = str | Messages | Sequence[int]


def encode(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptLike,
    context_length: int,
    chat: bool = True,
    *,
    name: str = "",
) -> list[int]:
    """The token ids of a user's message, a conversation of role/content messages, or token ids as they are.

    Args:
        tokenizer: None if prompts come as token ids.
        prompt: what to encode.
        context_length: of the model; there must be room for at least one more token.
        chat: put text through the chat template if the tokenizer has one.
        name: of the prompt, for the error messages.

    Raises:
        PromptError: an empty prompt, one that fills the context, or text without a tokenizer.
    """
    the_prompt = f"prompt '{name}'" if name else "the prompt"
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = cast("Sequence[int]", prompt.tolist())
    if not isinstance(prompt, str) and len(prompt) and all(isinstance(item, Integral) for item in prompt):
        token_ids = [int(item) for item in cast("Sequence[int]", prompt)]
    else:
        token_ids = _encode_text(tokenizer, cast("str | Messages", prompt), chat, the_prompt)
    if not token_ids:
        raise PromptError(f"{the_prompt} is empty", "Give at least one word.")
    if len(token_ids) >= context_length:
        raise PromptError(
            f"{the_prompt} has {len(token_ids)} tokens, and the model's context is {context_length}",
            "Shorten it so that there is room for an answer.",
        )
    return token_ids


def _encode_text(
    tokenizer: PreTrainedTokenizerBase | None, prompt: str | Messages, chat: bool, the_prompt: str
) -> list[int]:
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise PromptError(f"{the_prompt} is empty", "Give at least one word.")
    if tokenizer is None:
        raise PromptError(f"the model came without a tokenizer, and {the_prompt} is text", "Give token ids.")
    if isinstance(prompt, str):
        if not chat or not tokenizer.chat_template:
            return _token_ids(tokenizer, prompt, the_prompt)
        prompt = [{"role": "user", "content": prompt}]
    if not tokenizer.chat_template:
        raise PromptError(f"the tokenizer has no chat template, and {the_prompt} is a conversation", "Give plain text.")
    messages = [dict(message) for message in prompt]
    for place, message in enumerate(messages):
        missing = [key for key in ("role", "content") if not isinstance(message.get(key), str)]
        if missing:
            raise PromptError(f"message {place} of {the_prompt} has no '{missing[0]}' text, got {message}")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return _token_ids(tokenizer, str(text), the_prompt, add_special_tokens=False)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, the_prompt: str, **options: bool) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{the_prompt} is not Unicode text ({error})", "Give it as UTF-8.") from error
    return list(
        tokenizer(text, verbose=False, **options)["input_ids"]
    )  # silent on length: `encode` has its own sentence


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an output, as `transformers.generate` has them."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)
