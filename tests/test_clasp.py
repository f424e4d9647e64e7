"""CLaSp: redundant layers are found and skipped, and the output stays the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import endless
from test_native import tokens, wide_model

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.bench.clasp import ClaspDraft, ClaspSettings, choose_layers
from knn_ssd.bench.methods import make_methods
from knn_ssd.engine import Engine
from knn_ssd.errors import BenchError
from knn_ssd.kernels import binding
from knn_ssd.plan import Policy
from knn_ssd.sampling import Sampler
from knn_ssd.testing import tiny_model

native = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")


def with_idle_layers(idle: set[int], faint: float = 0.0) -> NativeBackend:
    """A model of 8 layers, some of which add nothing, or next to nothing, to the hidden states."""
    model = endless(wide_model("llama", num_hidden_layers=8))
    for index in idle:
        layer = model.base_model.layers[index]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data.mul_(faint)
    return NativeBackend(model)


@native
def test_a_layer_alone_gives_the_same_bits_as_in_a_forward_pass() -> None:
    backend = NativeBackend(wide_model("mistral"))  # its window is shorter than the prompt
    text = tokens(40)
    session = backend.open(60)
    session.prefill(text[:-1])
    states = backend.embed(text[-1]).repeat(3, 1)
    for layer in range(backend.num_layers):
        states = backend.run_layer(layer, states, session.cache, session.length)
    whole = backend.open(60).prefill(text).last
    final = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + backend.epsilon) * backend.norm
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(final[2], whole, rtol=1e-5, atol=1e-5)
    again = backend.open(60)
    again.prefill(text[:-1])
    assert torch.equal(session.forward(text[-1:]), again.forward(text[-1:])), "nothing was written"


@native
@pytest.mark.parametrize("faint", [0.0, 1e-5])
@pytest.mark.parametrize("idle", [{2, 5}, {0, 3, 7}, {1, 2, 3, 4}])
def test_the_layers_that_add_next_to_nothing_are_chosen(idle: set[int], faint: float) -> None:
    backend = with_idle_layers(idle, faint)
    session = backend.open(60)
    session.prefill(tokens(30))
    with session.rewound(1):
        assert choose_layers(backend, session, tokens(30)[-1], len(idle)) == sorted(idle)
        assert choose_layers(backend, session, tokens(30)[-1], 0) == []
    assert session.length == 30


@native
def test_drafts_without_idle_layers_are_right_and_layers_are_chosen_anew_in_time() -> None:
    backend = with_idle_layers({2, 3, 5, 6})
    session = backend.open(200)
    context = tokens(20)
    session.prefill(context[:-1])
    drafter = ClaspDraft(backend, session, Sampler([], greedy=True), ClaspSettings(0.5, 10, Policy(4, 0.0)))
    chosen = []
    for _ in range(6):
        draft = drafter.propose(context, 4)
        chosen.append(drafter.plan)
        right = session.forward([context[-1], *draft.tokens]).argmax(-1).tolist()
        assert right[:-1] == list(draft.tokens)
        session.commit(5)
        context += right
    assert all(plan.skipped_attention == plan.skipped_mlp == (2, 3, 5, 6) for plan in chosen)
    assert [a is b for a, b in pairwise(chosen)] == [True, False, True, False, True]


@native
def test_as_a_method_it_has_the_output_of_plain_decoding() -> None:
    engine = Engine(endless(wide_model("qwen3")))
    methods = make_methods(["plain", "clasp"], engine)
    for seed in range(4):
        plain, clasp = (methods[name](tokens(3 + 9 * seed, seed), 40) for name in ("plain", "clasp"))
        assert plain.token_ids == clasp.token_ids
        assert sum(clasp.details["drafted"].values()) > 0


def test_it_needs_the_native_backend() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(BenchError, match="layers one by one"):
        make_methods(["clasp"], Engine(model, backend=TransformersBackend(model)))
