"""Text to token ids, and token ids to text as they arrive: prompts, end tokens, detokenisation, stop strings."""

from __future__ import annotations

import inspect
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

from knn_ssd.checks import is_whole
from knn_ssd.errors import PromptError
from knn_ssd.stop_strings import StopMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
PromptLike = str | Messages | Sequence[int]


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How the chat template is applied to a conversation.

    Args:
        add_generation_prompt: end with what begins an answer of the assistant.
        continue_final_message: leave the last message open, so that the output continues it; no generation prompt is
            added then.
        variables: further variables that the template reads, by name.
        tools: the tools that the answer may call, as JSON schemas in OpenAI's form.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()


class ChatIds(list[int]):
    """Token ids of a conversation as the chat template writes it: what follows is a reply, and ends as one."""


def encode(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptLike,
    context_length: int,
    chat: bool = True,
    *,
    name: str = "",
    template: TemplateOptions | None = None,
) -> list[int]:
    """Token ids of a prompt: a user's message, a conversation of role/content messages, or token ids as they are.

    They are `ChatIds` if the chat template was applied.

    Args:
        tokenizer: None if prompts come as token ids.
        prompt: the prompt to encode.
        context_length: the model's context length; there must be room for at least one more token.
        chat: whether to apply the chat template to text, if the tokenizer has one.
        name: the prompt's name in error messages.
        template: how the chat template is applied.

    Raises:
        PromptError: an empty prompt, one that fills the context, one that the chat template refuses, or text without a
            tokenizer.
    """
    the_prompt = f"prompt '{name}'" if name else "the prompt"
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = cast("Sequence[int]", prompt.tolist())
    if not isinstance(prompt, str):
        _check_kind(prompt, the_prompt)
    if not isinstance(prompt, str) and len(prompt) and all(is_whole(item) for item in prompt):
        kind = ChatIds if isinstance(prompt, ChatIds) else list
        token_ids = kind(int(item) for item in cast("Sequence[int]", prompt))
    else:
        token_ids = _encode_text(tokenizer, cast("str | Messages", prompt), chat, the_prompt, template)
    if not token_ids:
        raise PromptError(f"{the_prompt} is empty", "Give at least one word.")
    if len(token_ids) >= context_length:
        raise PromptError(
            f"{the_prompt} has {len(token_ids)} tokens, and the model's context is {context_length}",
            "Shorten it so that there is room for an answer.",
        )
    return token_ids


def _check_kind(prompt: object, the_prompt: str) -> None:
    """Raises a `PromptError` for what is neither a conversation nor token ids."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise PromptError(f"{the_prompt} must be text, messages or token ids, got {reprlib.repr(prompt)}")
    if prompt and all(isinstance(item, str) or _is_list(item) for item in prompt):
        raise PromptError(f"{the_prompt} is a list of {len(prompt)} prompts", "Use `generate_batch` for several.")
    if not (all(is_whole(item) for item in prompt) or all(isinstance(item, Mapping) for item in prompt)):
        kind = Mapping if isinstance(prompt[0], Mapping) else Integral
        wrong = next(item for item in prompt if not isinstance(item, kind) or isinstance(item, bool))
        raise PromptError(f"{the_prompt} must be messages or token ids throughout, got {reprlib.repr(wrong)} in it")


def _is_list(item: object) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str | bytes | bytearray)


def _encode_text(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Messages,
    chat: bool,
    the_prompt: str,
    template: TemplateOptions | None,
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
    text = _apply_template(tokenizer, messages, the_prompt, template or TemplateOptions())
    return ChatIds(_token_ids(tokenizer, text, the_prompt, add_special_tokens=False))


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], the_prompt: str, options: TemplateOptions
) -> str:
    reserved = sorted(inspect.signature(tokenizer.apply_chat_template).parameters.keys() & options.variables.keys())
    if reserved:
        raise PromptError(f"'{reserved[0]}' cannot be a variable of the chat template", "Leave it out.")
    try:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=options.add_generation_prompt and not options.continue_final_message,
            continue_final_message=options.continue_final_message,
            tokenize=False,
            tools=cast("Any", list(options.tools) or None),
            **options.variables,
        )
    except Exception as error:  # a template is a program of the model's author, which may raise anything
        raise PromptError(
            f"the chat template cannot be applied to {the_prompt}: {error or type(error).__name__}"
        ) from error
    return str(text)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, the_prompt: str, **options: bool) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{the_prompt} is not Unicode text ({error})", "Give it as UTF-8.") from error
    return list(tokenizer(text, verbose=False, **options)["input_ids"])  # `encode` itself reports an excess of length


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-sequence tokens, as `transformers.generate` determines them."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The tokens that end a reply in a chat: the tokenizer's own, and what the chat template puts after a reply.

    Those that the model's generation config lacks, as many fine-tunes' do, are reported by a warning.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return frozenset()
    found = {tokenizer.eos_token_id, _after_reply(tokenizer)} - {None}
    if added := sorted(found - eos_token_ids(model)):
        names = ", ".join(f"'{tokenizer.convert_ids_to_tokens(token)}'" for token in added)
        logger.warning("replies in chats end at %s too, which the model's generation config lacks", names)
    return frozenset(found)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, chat: bool) -> frozenset[int]:
    """The tokens that end an output, those that end a reply included if prompts go through the chat template."""
    return eos_token_ids(model) | (end_of_turn_ids(model, tokenizer) if chat else frozenset())


def _after_reply(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that directly follows a reply by the chat template, if one does."""
    reply = "Yes."
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": reply}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may ask for other messages than these
        return None
    _, found, rest = text.rpartition(reply)
    rest = rest.lstrip()
    following = [
        (len(each.content), token)
        for token, each in tokenizer.added_tokens_decoder.items()
        if found and each.special and rest.startswith(each.content)
    ]
    return max(following)[1] if following else None


_UNFINISHED = "\ufffd"  # what tokenizers decode an incomplete character to
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a single byte's token


class Detokenizer:
    """Decodes one output incrementally, token by token.

    Args:
        tokenizer: decodes tokens; special tokens are left out.
        stop: strings that end the output; the text ends before the first of them.
        min_tokens: stop strings that are complete within so many tokens are part of the text.

    Attributes:
        stopped: whether a stop string is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        # Special tokens leave no text, so those among the stop strings are found by their ids.
        self._stop_ids = (
            {token for token, each in tokenizer.added_tokens_decoder.items() if each.special and each.content in stop}
            if stop
            else set()
        )
        self._stop = tuple(map(StopMatcher, stop))
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._window = 0  # decoding starts here: far enough back that the last text has its left context
        self._settled = 0  # tokens before this are in `_text`
        self._text = ""
        self._given = 0
        self.stopped = False

    def push(self, token_id: int) -> bool:
        """Adds a token, and returns whether a stop string is complete with it."""
        if token_id in self._stop_ids and len(self._token_ids) >= self._min_tokens:
            self._settle()
            self.stopped = True
            return True
        self._token_ids.append(token_id)
        settled = self._decode(self._window, self._settled)
        extended = self._decode(self._window, len(self._token_ids))
        if not extended.endswith(_UNFINISHED):
            self._append(extended[len(settled) :])
            if extended != settled:  # a special token leaves no text, and is no left context for what follows
                self._window = self._settled
            self._settled = len(self._token_ids)
        return self.stopped

    def take(self) -> str:
        """Text not returned before, except an end that may be the beginning of a stop string."""
        end = len(self._text) - (0 if self.stopped else self._possible_stop())
        fresh = self._text[self._given : end]
        self._given = max(self._given, end)
        return fresh

    @property
    def held(self) -> int:
        """How many characters of the tokens so far were not returned: of a possible stop string, or incomplete."""
        ends = () if self.stopped else (self._settled, len(self._token_ids))
        settled, extended = (len(self._decode(self._window, end)) for end in ends) if len({*ends}) > 1 else (0, 0)
        return max(len(self._text) - self._given, 0) + extended - settled

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if not self.stopped:
            self._settle()
        fresh = self._text[self._given :]
        self._given = len(self._text)
        return fresh

    def _settle(self) -> None:
        """Adds the text of all tokens, be its last character complete or not."""
        settled = self._decode(self._window, self._settled)
        self._append(self._decode(self._window, len(self._token_ids))[len(settled) :])
        self._settled = len(self._token_ids)

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True))

    def _append(self, fresh: str) -> None:
        before = len(self._text)
        self._text += fresh
        ends = [before + end for matcher in self._stop if (end := matcher.push(fresh)) is not None]
        if ends and len(self._token_ids) > self._min_tokens:
            self._text = self._text[: min(ends)]
            self.stopped = True

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        return max((matcher.matched for matcher in self._stop), default=0)


def echoed(tokenizer: PreTrainedTokenizerBase | None, token_ids: Sequence[int]) -> list[str]:
    """The pieces of text that the tokens of a prompt stand for; special tokens are left out."""
    if tokenizer is None:
        return [""] * len(token_ids)
    detokenizer, pieces = Detokenizer(tokenizer), []
    for token in token_ids:
        detokenizer.push(token)
        pieces.append(detokenizer.take())
    pieces[-1] += detokenizer.finish()
    return pieces


@dataclass(frozen=True, slots=True)
class Spelling:
    """The text and bytes of a single token.

    Args:
        text: the token's text, with U+FFFD for bytes that are not whole characters.
        data: its bytes; None if they are not known.
    """

    text: str
    data: bytes | None


def spell(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> Spelling:
    """The spelling of a token, or a special token, within a text; empty without a tokenizer."""
    if tokenizer is None:
        return Spelling("", None)
    once, twice = (
        str(tokenizer.decode([token_id] * n, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for n in (1, 2)
    )
    if _UNFINISHED in once:
        return Spelling(once, _bytes_of(str(tokenizer.convert_ids_to_tokens(token_id))))
    text = twice[len(once) :]  # at the beginning of a text some tokenizers drop a token's space
    return Spelling(text, text.encode())


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token by its name in the vocabulary, for SentencePiece's bytes and GPT-2's byte alphabet."""
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as they are; the others from 256 on
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    return bytes(byte_of[character] for character in name) if set(name) <= set(byte_of) else None
