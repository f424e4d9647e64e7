"""Text as it arrives: the pieces of a stream are the whole text, and nothing of a stop string is ever given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from knn_ssd.stop_strings import StopMatcher
from knn_ssd.testing import tiny_tokenizer
from knn_ssd.tokenization import Detokenizer

SPECIAL = {"<s>": 0, "</s>": 1}
WORDS = ("the", " the", "ab", "abc", " b", "\n\n", "ü", "€ ")


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """As of GPT-2 and Llama 3: every byte, and a few longer tokens."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(word)[0][0] for word in WORDS]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(words)]
    tokenizer = Tokenizer(models.BPE(vocab=SPECIAL | {s: i for i, s in enumerate(symbols, start=2)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama 2: words that carry their space, single bytes where there is no word."""
    symbols = ["▁", "▁the", "▁ab", "c", "the", "ü", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab=SPECIAL | {s: i for i, s in enumerate(symbols, start=2)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


def byte_ids(text: str) -> list[int]:
    """One token a byte."""
    tokenizer = byte_tokenizer()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [tokenizer.convert_tokens_to_ids(symbol) for symbol in byte_level.pre_tokenize_str(text)[0][0]]


def streamed(stream: Detokenizer, token_ids: list[int]) -> list[str]:
    """The piece given after each token up to a stop, and the rest."""
    pieces = []
    for token_id in token_ids:
        stopped = stream.push(token_id)
        pieces.append(stream.take())
        if stopped:
            break
    return [*pieces, stream.finish()]


def whole(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def stopped_naively(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first; None if none is."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


@settings(max_examples=300)
@given(text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=8), max_size=3))
def test_stop_strings_are_found_as_by_trying_every_place(text: str, stops: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    stream = Detokenizer(tokenizer, stops)
    pieces, wanted = streamed(stream, tokenizer(text)["input_ids"]), stopped_naively(text, stops)
    assert "".join(pieces) == (text if wanted is None else wanted)
    assert stream.stopped == (wanted is not None)


def test_a_stop_string_is_found_again_after_it_was_complete() -> None:
    matcher = StopMatcher("aba")
    assert [matcher.push(text) for text in ("xab", "a", "ba", "b", "x", "abab", "a")] == [
        None, -2, -1, None, None, 0, -2
    ]  # fmt: skip


# --- Pieces


@settings(max_examples=200)
@given(data=st.data())
def test_pieces_join_to_the_whole_text_whatever_the_bytes(data: st.DataObject) -> None:
    tokenizer = byte_tokenizer()
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    assert "".join(streamed(Detokenizer(tokenizer), token_ids)) == whole(tokenizer, token_ids)


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["▁", "▁the", "▁ab", "c", "the", "ü", "€", "🙂", "\n", "x"]), max_size=8))
def test_pieces_of_words_join_to_the_whole_text(symbols: list[str]) -> None:
    tokenizer = word_tokenizer()
    known = tokenizer.get_vocab()
    token_ids = [
        known[token]
        for symbol in symbols
        for token in ([symbol] if symbol in known else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]
    assert "".join(streamed(Detokenizer(tokenizer), token_ids)) == whole(tokenizer, token_ids)


@pytest.mark.parametrize(("make_tokenizer", "symbol"), [(byte_tokenizer, "Ġthe"), (word_tokenizer, "▁the")])
def test_special_tokens_leave_no_trace_in_the_text(
    make_tokenizer: Callable[[], PreTrainedTokenizerFast], symbol: str
) -> None:
    tokenizer = make_tokenizer()
    the = tokenizer.convert_tokens_to_ids(symbol)
    for token_ids in ([0, the, the, 1], [the, 0, the], [the, 1, 0, the, the]):
        assert "".join(streamed(Detokenizer(tokenizer), token_ids)) == whole(tokenizer, token_ids)


@given(st.text(max_size=8))
def test_characters_split_over_tokens_arrive_whole(text: str) -> None:
    pieces = streamed(Detokenizer(byte_tokenizer()), byte_ids(text) if text else [])
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


def test_a_character_is_given_with_its_last_byte() -> None:
    assert streamed(Detokenizer(byte_tokenizer()), byte_ids("a€b")) == ["a", "", "", "€", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    assert streamed(Detokenizer(byte_tokenizer()), byte_ids("a€")[:-1]) == ["a", "", "", "\ufffd"]


def test_nothing_pushed_is_nothing_given() -> None:
    stream = Detokenizer(byte_tokenizer())
    assert stream.take() == stream.finish() == ""
    assert not stream.stopped


def test_a_piece_is_given_once() -> None:
    stream = Detokenizer(tiny_tokenizer())
    stream.push(ord("a"))
    assert [stream.take(), stream.take(), stream.finish(), stream.finish()] == ["a", "", "", ""]


# --- Stop strings


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("one.two", ["."], ["o", "n", "e", "", ""]),
        ("abcd", ["cd"], ["a", "b", "", "", ""]),
        ("abce", ["cd"], ["a", "b", "", "ce", ""]),
        ("abc", ["cd"], ["a", "b", "", "c"]),  # the output ended with what might have become a stop
        ("aaab", ["aab"], ["", "", "a", "", ""]),
        ("xyz", ["xyzz", "yz"], ["", "", "x", ""]),
        ("x€y", ["€"], ["x", "", "", "", ""]),
        ("ab", [], ["a", "b", ""]),
    ],
)
def test_text_is_held_back_exactly_while_it_may_be_a_stop(text: str, stop: list[str], pieces: list[str]) -> None:
    stream = Detokenizer(byte_tokenizer(), stop)
    assert streamed(stream, byte_ids(text)) == pieces
    assert stream.stopped == any(s in text for s in stop)


@settings(max_examples=300)
@given(
    token_ids=st.lists(st.sampled_from([*map(ord, "ab\n c"), *range(258, 266)]), max_size=14),
    stop=st.lists(st.text("ab\n c", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(token_ids: list[int], stop: list[str]) -> None:
    tokenizer = byte_tokenizer()
    token_ids = [i if i >= 258 else byte_ids(chr(i))[0] for i in token_ids]
    so_far = [whole(tokenizer, token_ids[:n]) for n in range(1, len(token_ids) + 1)]
    stopping = next((text for text in so_far if any(s in text for s in stop)), None)
    expected = (so_far[-1] if so_far else "") if stopping is None else ""
    if stopping is not None:
        expected = stopping[: min(stopping.index(s) for s in stop if s in stopping)]

    stream = Detokenizer(tokenizer, stop)
    pieces = streamed(stream, token_ids)
    assert "".join(pieces) == expected
    assert stream.stopped == (stopping is not None)
    assert len(pieces) == 1 + (len(token_ids) if stopping is None else so_far.index(stopping) + 1)


@settings(max_examples=200)
@given(text=st.text("abc", max_size=12), stop=st.text("abc", min_size=1, max_size=4))
def test_what_was_given_never_has_to_be_taken_back(text: str, stop: str) -> None:
    given_so_far = ""
    final = text.split(stop, maxsplit=1)[0]
    for piece in streamed(Detokenizer(tiny_tokenizer(), [stop]), list(map(ord, text))):
        given_so_far += piece
        assert final.startswith(given_so_far)
    assert given_so_far == final
