"""Files of OpenAI's batch API: a request on each line, and the line that answers it. Knows nothing of how it is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import PromptError, UsageError
from knn_ssd.prompts import parse_line

if TYPE_CHECKING:
    from pydantic import ValidationError
    from transformers import PreTrainedTokenizerBase

    from knn_ssd.engine import Engine
    from knn_ssd.outputs import Chunk, Generation
    from knn_ssd.server.schemas import ChatRequest, CompletionRequest
    from knn_ssd.server.thinking import Thinking
    from knn_ssd.tokenization import PromptLike

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ID = "batch_req_"


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request.

    Args:
        custom_id: its name.
        is_chat: whether it is a chat completion.
        request: its body.
    """

    custom_id: str
    is_chat: bool
    request: ChatRequest | CompletionRequest

    @property
    def prompt(self) -> PromptLike:
        """Its prompt."""
        return self.request.prompts[0]

    def thinking(self, engine: Engine, token_ids: Sequence[int]) -> Thinking | None:
        """How the answer to its prompt may begin with thinking, if the answer has to be of a form."""
        from knn_ssd.server.schemas import ChatRequest
        from knn_ssd.server.thinking import Thinking

        if not isinstance(self.request, ChatRequest) or not self.request.has_form or engine.tokenizer is None:
            return None
        return Thinking.of(engine.tokenizer, token_ids)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `Engine.stream`."""
        return {**self.request.options(), "seed": self.request.seed_of(0), "store": self.request.store is not False}


def is_batch(lines: Sequence[str]) -> bool:
    """Whether the first line that is not empty is a request of a batch."""
    first = next((line for line in lines if line.strip()), "{}")
    try:
        return {"custom_id", "body"} <= set(parse_line(first, ""))
    except PromptError:
        return False


def parse_requests(lines: Sequence[str], name: str) -> list[BatchLine]:
    """The requests of a file; error messages call it `name`.

    Raises:
        PromptError: a line is not a request, or asks for what is not supported.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return [_parse(line, f"{name}, line {number}") for number, line in numbered]


def _parse(line: str, where: str) -> BatchLine:
    from pydantic import ValidationError

    from knn_ssd.request_options import RequestOptions
    from knn_ssd.server.schemas import ChatRequest, CompletionRequest

    data = parse_line(line, where)
    custom_id, method, url = (data.get(each) for each in ("custom_id", "method", "url"))
    if not isinstance(custom_id, str) or not custom_id:
        raise PromptError(f"{where} has no 'custom_id'", "Give each request a name of its own.")
    if method not in ("POST", None) or url not in (_CHAT, _COMPLETIONS):
        raise PromptError(f"{where} asks for {method} {url}", f"POST to {_CHAT} or {_COMPLETIONS} is supported.")
    try:
        request = (ChatRequest if url == _CHAT else CompletionRequest).model_validate(data.get("body"))
    except ValidationError as error:
        raise PromptError(f"{where}: {_problem(error)}", "Correct or remove the request.") from error
    if request.n != 1 or request.stream or len(request.prompts) > 1 or request.echoes:
        several = f"n={request.n}" if request.n != 1 else f"{len(request.prompts)} prompts"
        given = "stream=true" if request.stream else "echo=true" if request.echoes else several
        raise PromptError(
            f"{where}: a request of a batch has one answer, which is neither streamed nor echoed, got {given}"
        )
    try:
        RequestOptions.of(request.options())
    except UsageError as error:
        raise PromptError(f"{where}: {error.message}", error.hint) from error
    if isinstance(request, ChatRequest) and request.offers_tools:
        raise PromptError(f"{where} offers tools", "Use `knn-ssd serve`, or set its tool_choice to 'none'.")
    return BatchLine(custom_id, url == _CHAT, request)


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, ("body", *first["loc"])))
    return f"'{place}' is not supported" if first["type"] == "extra_forbidden" else f"'{place}': {first['msg']}"


def result_json(
    line: BatchLine,
    key: str,
    prompt_tokens: int,
    generation: Generation,
    tokenizer: PreTrainedTokenizerBase | None,
    thinking: Thinking | None = None,
) -> dict[str, Any]:
    """The line that answers a request.

    Args:
        line: the request.
        key: names the answer in its ids.
        prompt_tokens: length of the prompt.
        generation: the output.
        tokenizer: spells the tokens of log-probabilities.
        thinking: how an answer of a demanded form may begin.
    """
    from knn_ssd.server.replies import usage
    from knn_ssd.server.schemas import FINISH_REASONS

    message = {"role": "assistant", "content": generation.text}
    if thinking is not None and tokenizer is not None:
        message |= _divided(thinking, _chunk(line, generation, tokenizer))
    content: dict[str, Any] = {"message": message} if line.is_chat else {"text": generation.text}
    logprobs = None if line.request.num_logprobs is None else _logprobs(line, generation, tokenizer)
    choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": FINISH_REASONS[generation.finish_reason]}
    body = {
        "id": f"{'chatcmpl' if line.is_chat else 'cmpl'}-{key}",
        "object": "chat.completion" if line.is_chat else "text_completion",
        "created": int(time.time()),
        "model": line.request.model,
        "choices": [choice],
        "usage": usage(prompt_tokens, len(generation.token_ids), [generation]),
    }
    response = {"status_code": 200, "request_id": f"req_{key}", "body": body}
    return {"id": f"{_ID}{key}", "custom_id": line.custom_id, "response": response, "error": None}


def key_of(data: dict[str, Any]) -> str:
    """The key of the line that answers a request."""
    return str(data.get("id")).removeprefix(_ID)


def _logprobs(line: BatchLine, generation: Generation, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    from knn_ssd.server.logprobs import Logprobs

    writer = Logprobs(tokenizer)
    if line.is_chat:
        return writer.chat([_chunk(line, generation, None)])
    return writer.completion([_chunk(line, generation, tokenizer)])


def _divided(thinking: Thinking, chunk: Chunk) -> dict[str, str]:
    """The fields of a message whose text may begin with thinking."""
    from knn_ssd.server.reply_text import ReplyText

    reply = ReplyText(thinking, None, thinking.special)
    reply.push(chunk)
    reply.finish()
    return {"content": reply.content, **({"reasoning_content": reply.reasoning} if reply.reasoning else {})}


def _chunk(line: BatchLine, generation: Generation, tokenizer: PreTrainedTokenizerBase | None) -> Chunk:
    """The output as a single round; without its text if no tokenizer is given."""
    from knn_ssd.outputs import Chunk
    from knn_ssd.speculation.decode import Round
    from knn_ssd.tokenization import Detokenizer

    pieces, held = [""] * len(generation.token_ids), [0] * len(generation.token_ids)
    if tokenizer is not None:
        detokenizer = Detokenizer(tokenizer, line.request.options()["stop"])
        for place, token in enumerate(generation.token_ids):
            detokenizer.push(token)
            pieces[place], held[place] = detokenizer.take(), detokenizer.held
        pieces[-1] += detokenizer.finish()
        held[-1] = 0
    return Chunk(tuple(pieces), Round(generation.token_ids, logprobs=generation.logprobs), tuple(held))
