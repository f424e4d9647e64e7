"""Chats end where their replies end, whatever the generation config of a fine-tune lacks; other prompts do not."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import PROMPT, transformers_output
from transformers import PreTrainedTokenizerFast

from knn_ssd.engine import Engine
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tokenization import ChatIds, Detokenizer, end_of_turn_ids

LIKE_GEMMA = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
LIKE_LLAMA_3 = "{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
LIKE_PHI_3 = "{% for m in messages %}{{ m['content'] + '<|end|>\n' }}{% endfor %}</s>"
LIKE_HARMONY = (
    "{% for m in messages %}{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}<|return|>"
    "{% else %}<|end|>{% endif %}{% endfor %}"
)
STRICT = "{% if messages | length > 1 %}{{ raise_exception('one message, please') }}{% endif %}x"
SPECIAL = ("<end_of_turn>", "<|eot_id|>", "<|end|>", "<|return|>", "<|im_end|>")


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (LIKE_GEMMA, "<end_of_turn>"),
        (LIKE_LLAMA_3, "<|eot_id|>"),
        (LIKE_PHI_3, "<|end|>"),
        (LIKE_HARMONY, "<|return|>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "</s>"),
        (STRICT, "</s>"),
    ],
)
def test_what_follows_a_reply_in_the_template_ends_it(
    template: str, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tiny_model(), tokenizer_with(template)
    model.generation_config.eos_token_id = None
    ids = tokenizer.convert_tokens_to_ids([ends, "</s>"])
    assert end_of_turn_ids(model, tokenizer) == set(ids)
    assert f"'{ends}'" in caplog.text


def test_what_the_generation_config_has_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Engine(tiny_model(), tiny_tokenizer(chat=True))
    assert "replies in chats" not in caplog.text


def test_it_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(tiny_model(), tokenizer_with(LIKE_GEMMA))
    for _ in range(2):
        engine.generate("a fox", max_new_tokens=2)
    assert caplog.text.count("'<end_of_turn>'") == 1


def test_a_chat_ends_at_the_end_of_turn_and_other_prompts_do_not() -> None:
    model, tokenizer = tiny_model(vocab_size=160, tie_word_embeddings=False), tokenizer_with(LIKE_GEMMA)
    model.generation_config.eos_token_id = None
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    ids = Engine(model).encode(list(Engine(model, tokenizer).encode("a fox")))
    assert not isinstance(ids, ChatIds)
    plain = transformers_output(model, ids, 12)
    place = next(i for i in range(2, 12) if plain[i] not in plain[:i])
    # The token that the model says there trades places with the end of turn.
    rows = model.lm_head.weight
    with torch.no_grad():
        rows[[turn, plain[place]]] = rows[[plain[place], turn]]
    engine = Engine(model, tokenizer)
    reply = engine.generate("a fox", max_new_tokens=12)
    assert reply.token_ids[-1] == turn
    assert (len(reply.token_ids), reply.finish_reason) == (place + 1, FinishReason.EOS)
    for conversation in ([{"role": "user", "content": "a fox"}], engine.encode("a fox")):
        assert engine.generate(conversation, max_new_tokens=12).token_ids == reply.token_ids
    assert len(engine.generate(ids, max_new_tokens=12).token_ids) == 12  # as transformers.generate
    assert list(engine.generate(ids, max_new_tokens=12).token_ids) == transformers_output(model, ids, 12)


@pytest.mark.parametrize("stop", [["<|im_end|>"], ["zz", "<|im_end|>"]])
def test_a_special_token_can_be_a_stop_string(stop: list[str]) -> None:
    tokenizer = tokenizer_with(LIKE_GEMMA)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    detokenizer = Detokenizer(tokenizer, stop)
    assert not any(detokenizer.push(token) for token in tokenizer("A FOX")["input_ids"])
    assert not detokenizer.push(tokenizer.convert_tokens_to_ids("<|end|>"))
    assert detokenizer.push(end)
    assert detokenizer.take() + detokenizer.finish() == "A FOX"  # lower-case letters share their ids with added tokens


def test_an_output_stops_at_a_special_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    output = transformers_output(model, PROMPT, 12)
    place = next(i for i in range(2, 12) if output[i] not in output[:i])
    text = tokenizer.convert_ids_to_tokens(output[place])
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    assert tokenizer.convert_tokens_to_ids(text) == output[place]
    generation = Engine(model, tokenizer).generate(PROMPT, max_new_tokens=12, stop=text)
    assert list(generation.token_ids) == output[: place + 1]
    assert generation.finish_reason == FinishReason.STOP
    assert text not in generation.text
