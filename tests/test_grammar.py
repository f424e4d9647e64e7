"""Output by a grammar: plain masked decoding, whatever is drafted, and valid at its end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from helpers import NUM_LAYERS, TableSession, keep_everything, skip_something
from test_sampling import SIGNIFICANCE, drawing, enumerated, marginal, p_value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.grammar import MOST_SCHEMA_CHARACTERS, Grammar
from knn_ssd.grammar_state import GrammarCompiler, GrammarState
from knn_ssd.outputs import Generation
from knn_ssd.plan import Plan, Policy
from knn_ssd.request_options import BatchRequest
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.speculation.decode import FinishReason, decode
from knn_ssd.speculation.drafter import Draft
from knn_ssd.speculation.grammar_draft import GrammarDraft
from knn_ssd.speculation.self_draft import SelfDraft
from knn_ssd.testing import tiny_model, tiny_tokenizer

END = 2
SCHEMAS: dict[str, dict[str, Any]] = {
    "enums": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "grey"]}, "size": {"enum": [1, 10, None, True]}},
        "required": ["colour", "size"],
        "additionalProperties": False,
    },
    "arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 12}, "maxItems": 3},
        "minItems": 2,
        "maxItems": 3,
    },
    "strings": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "code": {"type": "string", "pattern": "^[A-C]{2,4}-\\d$"},
            "date": {"type": "string", "format": "date"},
        },
        "required": ["name", "code", "date"],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "object",
        "properties": {"x": {"type": "number", "minimum": -1, "maximum": 1.5}, "n": {"type": "integer", "minimum": 7}},
        "required": ["x", "n"],
    },
    "choice": {
        "anyOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "id": {"type": "integer"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}, "next": {"$ref": "#"}}, "required": ["kind"]},
        ]
    },
}
DRAFTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "self": {"plan": skip_something()},
    "self, all accepted": {"plan": keep_everything(5)},
    "lookup": {"plan": Plan.skipping(NUM_LAYERS, policy=Policy(6, 0.0, lookup=True))},
}
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {34: 3.0}}


def long_tokens() -> PreTrainedTokenizerFast:
    """A tokenizer in whose tokens the same bytes can be written in many ways."""
    samples = [json.dumps({"colour": "red", "size": 10, "name": "ab", "kind": "a", "next": {}, "x": 1.5})] * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(samples, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@cache
def engine(tokens: str) -> Engine:
    tokenizer = tiny_tokenizer() if tokens == "characters" else long_tokens()
    size = 128 if tokens == "characters" else 340  # more rows than tokens
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}  # for the kernels and 4 bits
    return Engine(tiny_model(vocab_size=size, initializer_range=0.4, **sizes), tokenizer)


PROMPT = [40, 51, 63, 70, 51, 63]
every_tokenizer = pytest.mark.parametrize("tokens", ["characters", "long tokens"])


def check(schema: dict[str, Any], output: Generation) -> None:
    """A finished output is valid, and one that is cut off begins as a valid one would."""
    if output.finish_reason is FinishReason.EOS:
        assert jsonschema_rs.is_valid(schema, json.loads(output.text)), output.text
    else:
        assert output.finish_reason is FinishReason.LENGTH


class FreshMask(LogitsProcessor):
    """The same mask from a matcher that is made anew for each position."""

    def __init__(self, engine: Engine, grammar: Grammar, prompt_length: int) -> None:
        self._make = lambda: engine._grammars.compile(grammar).deep_copy()
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        matcher = self._make()
        output = input_ids[0, self._prompt_length :].tolist()
        assert matcher.try_consume_tokens(output) == len(output)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits[: len(allowed)].astype(bool))
        allowed[END] = matcher.is_accepting()
        return scores.masked_fill(~allowed, float("-inf"))


# --- The state


def walk(state: GrammarState, generator: torch.Generator) -> list[int]:
    """An output of a random length, which may have ended, and may have a token that is refused."""
    output: list[int] = []
    for _ in range(int(torch.randint(40, (1,), generator=generator))):
        allowed = state.allowed(output, 340)
        if allowed is None:
            break
        choices = np.flatnonzero(allowed)
        output.append(int(choices[int(torch.randint(len(choices), (1,), generator=generator))]))
    if int(torch.randint(4, (1,), generator=generator)) == 0:
        output.append(int(torch.randint(3, 300, (1,), generator=generator)))
    return output


@every_tokenizer
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_state_is_a_function_of_the_output_alone(tokens: str, name: str) -> None:
    compiler, grammar = engine(tokens)._grammars, Grammar.json_schema(SCHEMAS[name])
    generator = torch.Generator().manual_seed(4)
    outputs = [walk(compiler.start(grammar, 0, {END}), generator) for _ in range(12)]
    outputs += [output[: len(output) // 2] for output in outputs]
    moved = compiler.start(grammar, 0, {END})
    for place in torch.randperm(len(outputs), generator=generator).tolist():
        output, fresh = outputs[place], compiler.start(grammar, 0, {END})
        draft = outputs[place - 1][len(output) :]
        assert moved.count_allowed(output, draft) == fresh.count_allowed(output, draft)
        one, other = moved.allowed(output, 340), fresh.allowed(output, 340)
        assert (one is None and other is None) or np.array_equal(one, other)
        assert moved.forced(output) == fresh.forced(output)


@every_tokenizer
def test_forced_tokens_are_allowed_one_after_the_other(tokens: str) -> None:
    state = engine(tokens)._grammars.start(Grammar.json_schema({"const": {"colour": "red"}}), 0, {END})
    forced = state.forced([])
    assert forced[-1] == END
    for place, token in enumerate(forced):
        allowed = state.allowed(forced[:place], 340)
        assert allowed is not None
        assert allowed[token]
        assert state.count_allowed(forced[:place], forced[place:]) == len(forced) - place
    assert state.allowed(forced, 340) is None
    assert engine(tokens).tokenizer.decode(forced[:-1]) == '{"colour": "red"}'


def test_copied_tokens_that_the_grammar_refuses_are_cut_off() -> None:
    state = engine("characters")._grammars.start(Grammar.json_schema({"enum": ["red"]}), 1, {END})
    drafter = GrammarDraft(state)
    right, wrong = [ord(each) for each in '"red'], [ord(each) for each in "xx"]
    own = Draft(tuple(right), None, "self", confidences=(0.5, 0.5, 0.5, 0.5))
    assert drafter.without_refused([9], own) is own
    extended = replace(own, tokens=(*right, *wrong), num_copied=2)
    assert drafter.without_refused([9], extended) == own
    assert drafter.without_refused([9], Draft(tuple(wrong), drafter="lookup")).tokens == ()


# --- Greedy


@every_tokenizer
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["", "penalties"])
def test_greedy_output_is_that_of_plain_masked_decoding(tokens: str, name: str, penalties: dict[str, Any]) -> None:
    options = {"grammar": Grammar.json_schema(SCHEMAS[name]), "max_new_tokens": 90, **penalties}
    plain = engine(tokens).generate(PROMPT, plain=True, **options)
    check(SCHEMAS[name], plain)
    assert plain.stats.drafted == 0
    for drafts in DRAFTS.values():
        drafted = engine(tokens).generate(PROMPT, **drafts, **options)
        assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert drafted.text == plain.text
        if tokens == "characters" and name != "arrays" and "plan" in drafts:
            assert drafted.stats.by_drafter["grammar"].accepted > 0


@every_tokenizer
def test_greedy_output_is_that_of_transformers_with_a_fresh_mask(tokens: str) -> None:
    grammar, prompt = Grammar.json_schema(SCHEMAS["strings"]), torch.tensor([PROMPT])
    mask = FreshMask(engine(tokens), grammar, len(PROMPT))
    theirs = engine(tokens).model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=80,
        logits_processor=LogitsProcessorList([mask]),
        pad_token_id=0,
    )
    ours = engine(tokens).generate(PROMPT, grammar=grammar, max_new_tokens=80)
    assert list(ours.token_ids) == theirs[0, len(PROMPT) :].tolist()


@every_tokenizer
def test_any_json_object(tokens: str) -> None:
    for bias in (0, 20):  # quotes and braces that end it soon, or not
        options = {"grammar": Grammar.json_object(), "max_new_tokens": 60}
        options["logit_bias"] = dict.fromkeys(engine(tokens).tokenizer.encode('"}'), bias)
        plain = engine(tokens).generate(PROMPT, plain=True, **options)
        drafted = engine(tokens).generate(PROMPT, plan=skip_something(), **options)
        assert drafted.token_ids == plain.token_ids
        check({"type": "object"}, drafted)
        assert drafted.text.startswith("{")


def test_a_forced_draft_in_other_tokens_than_the_targets_is_only_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine("long tokens")
    vocabulary = own.tokenizer.get_vocab()
    options = {"grammar": Grammar.json_schema(SCHEMAS["enums"]), "max_new_tokens": 90}
    options["logit_bias"] = {token: 100 for word, token in vocabulary.items() if len(word) > 1 and token > END}

    def in_single_characters(state: GrammarState, output: list[int]) -> list[int]:
        draft: list[int] = []
        while len(draft) < 4 and (allowed := state.allowed([*output, *draft], 340)) is not None:
            draft.append(int(np.flatnonzero(allowed)[0]))  # the alphabet has the lowest ids
        return draft

    monkeypatch.setattr(GrammarState, "forced", in_single_characters)
    plain = own.generate(PROMPT, plain=True, **options)
    drafted = own.generate(PROMPT, plan=keep_everything(4), **options)
    assert drafted.token_ids == plain.token_ids
    count = drafted.stats.by_drafter["grammar"]
    assert count.accepted < count.drafted, "some of the forced bytes were written in other tokens"
    check(SCHEMAS["enums"], drafted)


def test_an_output_that_is_cut_off_says_so() -> None:
    options = {"grammar": Grammar.json_schema(SCHEMAS["enums"]), "max_new_tokens": 7}
    output = engine("characters").generate(PROMPT, **options)
    assert (output.finish_reason, len(output.token_ids)) == (FinishReason.LENGTH, 7)
    assert output.text == '{"colou'


# --- In company


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "seed": 5}, {"temperature": 0.9, "top_k": 9, "seed": 6}])
def test_output_is_the_same_alone_and_in_company(sampling: dict[str, Any]) -> None:
    common = {"max_new_tokens": 60, **sampling}
    kinds: list[dict[str, Any]] = [{"grammar": Grammar.json_schema(schema)} for schema in SCHEMAS.values()]
    kinds += [{}, {**kinds[0], **PENALTIES}, {**kinds[2], **PENALTIES}]
    requests = [BatchRequest([*PROMPT, 33 + n], {**kind, **common}) for n, kind in enumerate(kinds)]
    together = dict(engine("long tokens").stream_batch(requests, concurrency=5))
    for place, request in enumerate(requests):
        alone = engine("long tokens").generate(request.prompt, **request.options)
        assert together[place].token_ids == alone.token_ids
        if "grammar" in request.options and place < len(SCHEMAS):
            check(list(SCHEMAS.values())[place], alone)


# --- Sampling


LETTERS = ("a", "b", "c", "ab", "bc", "ca", "</s>")
LENGTH = 4


def letters() -> PreTrainedTokenizerFast:
    vocabulary = {word: token for token, word in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("c", "a")]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


class LettersMask(LogitsProcessor):
    """Which tokens may follow by a slow rule: those after which some word of the language goes on."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        text = "".join(LETTERS[token] for token in input_ids[0, self._prompt_length :].tolist())
        allowed = [is_prefix(text + word) for word in LETTERS[:-1]]
        return scores.masked_fill(~torch.tensor([*allowed, False]), float("-inf"))


def is_prefix(text: str) -> bool:
    """Whether a text begins a word of (a(b|c)|ca?b)*."""
    return (
        not text
        or text in ("a", "c", "ca")
        or any(text.startswith(unit) and is_prefix(text[len(unit) :]) for unit in ("ab", "ac", "cab", "cb"))
    )


@pytest.fixture(scope="module")
def letters_state() -> Callable[[], GrammarState]:
    compiler = GrammarCompiler(letters(), len(LETTERS))
    grammar = Grammar.lark("start: /(a(b|c)|ca?b){40}/")
    return lambda: compiler.start(grammar, 2, {6})


class AnyDraft:
    """Drafts tokens that the grammar may refuse, forced ones, or the self-draft's, in turn."""

    def __init__(self, self_draft: SelfDraft, forced: GrammarDraft) -> None:
        self._self_draft, self._forced = self_draft, forced
        self._turn = 0

    def propose(self, context: list[int], limit: int) -> Any:
        self._turn += 1
        forced = self._forced.propose(context, limit)
        return forced if forced.tokens and self._turn % 2 else self._self_draft.propose(context, limit)

    def learn(self, outcome: Any) -> None:
        pass


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.0), SamplingParams(temperature=1.4, top_k=2)])
def test_sampling_over_drafts_has_the_masked_targets_distribution(
    params: SamplingParams, letters_state: Callable[[], GrammarState]
) -> None:
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(7, 7, generator=generator)
    draft = target + torch.randn(7, 7, generator=generator)
    prompt = [4, 2]
    warpers = list(Sampler.from_params(params, torch.device("cpu")).processors)
    expected = enumerated(lambda output: target[[*prompt, *output][-1]], prompt, [LettersMask(2), *warpers], LENGTH)
    state, outputs, counts = letters_state(), [], Counter[str]()
    seeded = drawing(params, seed=3)
    sampler = Sampler(seeded.processors, False, seeded.generator, state)
    plan = Plan.skipping(1, attention=[0], policy=Policy(max_draft=3, threshold=0.0))
    for _ in range(900):
        context = list(prompt)
        session: Any = TableSession(target, draft, len(context))
        drafter = AnyDraft(SelfDraft(session, plan, sampler), GrammarDraft(state))
        for each in decode(session, context, target[context[-1]], drafter, sampler, LENGTH, lambda _token: None):
            counts.update(each.drafters)
            counts["accepted"] += each.accepted
        outputs.append(tuple(context[len(prompt) :]))
    assert 0.2 * (counts["self"] + counts["grammar"]) < counts["accepted"] < counts["self"] + counts["grammar"]
    assert p_value(outputs, expected) > SIGNIFICANCE
    for position in range(LENGTH):
        if len(shares := marginal(expected, position)) > 1:
            assert p_value([output[position] for output in outputs], shares) > SIGNIFICANCE


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0)], ids=["greedy", "sampled"])
def test_a_self_draft_masks_each_token_once(
    params: SamplingParams, letters_state: Callable[[], GrammarState], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    mask = GrammarState.mask

    def noted(state: GrammarState, context: list[int], scores: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(context))
        return mask(state, context, scores)

    monkeypatch.setattr(GrammarState, "mask", noted)
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(7))
    sampler = Sampler.from_params(params, torch.device("cpu"), 2, {6}, letters_state())
    session: Any = TableSession(table, table, 2)
    plan = Plan.skipping(1, attention=[0], policy=Policy(max_draft=3, threshold=0.0))
    draft = SelfDraft(session, plan, sampler).propose([4, 2], 3)
    assert asked == [(4, 2, *draft.tokens[:count]) for count in range(3)]


# --- What is refused


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "word"}, "Invalid type: word"),
        ({"enum": []}, "anyOf is empty"),
        ({"$ref": "https://example.com/x"}, "not present"),
        ({"type": "integer", "multipleOf": 7919 * 7907}, "common multiple 10000"),
        ({"allOf": [{"type": "number", "multipleOf": n} for n in (7, 11, 13, 17, 19)]}, "common multiple 10000"),
        ({"enum": ["x" * 60] * 5000}, f"{MOST_SCHEMA_CHARACTERS} characters"),
        ("{", "cannot be read"),
        ("[1]", "must be an object"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"enum": ["a\ud800"]}, "half a character"),
        ({"properties": {"a\ud800": {}}}, "half a character"),
        ('{"const": "\ud800"}', "half a character"),
        ('{"const": "\\ud800"}', "half a character"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(schema: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Grammar.json_schema(schema)
    assert words in str(caught.value)


def test_a_grammar_with_half_a_character_is_refused() -> None:
    for make in (Grammar, Grammar.lark):
        with pytest.raises(UsageError, match="half a character"):
            make('start: "\ud800"')


@pytest.mark.parametrize("nesting", ["definitions", "levels"])
def test_a_schema_that_would_be_compiled_too_deeply_is_refused(nesting: str) -> None:
    schema: dict[str, Any] = {"type": "string"}
    if nesting == "levels":
        for _ in range(3000):
            schema = {"items": schema}
    else:
        chain = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(900)}
        schema = {"$defs": {**chain, "d900": {"type": "string"}}, "$ref": "#/$defs/d0"}
    with pytest.raises(UsageError, match=r"500 levels|nested too deeply"):
        Grammar.json_schema(schema)


def test_what_would_contradict_a_grammar_is_refused() -> None:
    grammar = Grammar.json_object()
    for option in ({"ignore_eos": True}, {"min_tokens": 4}):
        with pytest.raises(UsageError, match="decides where the output may end"):
            engine("characters").generate(PROMPT, grammar=grammar, **option)
    with pytest.raises(UsageError, match="needs a fast tokenizer"):
        Engine(tiny_model()).generate(PROMPT, grammar=grammar)
    with pytest.raises(UsageError, match="must be a Grammar"):
        engine("characters").generate(PROMPT, grammar={"type": "object"})


def test_a_grammar_with_characters_that_the_tokenizer_lacks_is_an_error_at_the_same_place() -> None:
    options = {"grammar": Grammar.json_schema({"enum": ["aé", "a€"]}), "max_new_tokens": 20}
    for drafts in ({"plain": True}, {}, {"plan": keep_everything()}):
        with pytest.raises(UsageError, match="cannot be completed by its grammar"):
            engine("characters").generate(PROMPT, **drafts, **options)
    assert engine("characters").generate(PROMPT, **{**options, "max_new_tokens": 2}).text == '"a'
