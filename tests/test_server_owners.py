"""What a server keeps between requests, and for whom: no client learns from its own requests what others asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import endless, endless_tokenizer
from server import MODEL, Served, new_store, serving
from server_process import ServerProcess, save_model, server_process

from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.owner import Owner
from knn_ssd.routing.answers import DEFAULT_MAX_TOKENS, AnswerStore
from knn_ssd.server.app import ServeSettings
from knn_ssd.server.owners import Owners, owner_name, read_keys
from knn_ssd.server.responses import PromptTexts
from knn_ssd.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.xdist_group("server process")

LONG = "a fox and a goose went down to the river, and they talked about the weather. "
MEMORY = 2**22  # of prefix caches


def native_engine() -> Engine:
    """An engine on the native backend, which has a prefix cache."""
    return Engine(endless(tiny_model("llama", hidden_size=96, head_dim=32)), endless_tokenizer())


@pytest.fixture
def two() -> Iterator[Served]:
    """A server of two clients, each with an API key."""
    owners = Owners.dividing(MEMORY, new_store, keys=["one", "two"])
    yield from serving(ServeSettings(MODEL, owners), native_engine())


@pytest.fixture
def shared() -> Iterator[Served]:
    """A server of two clients who share what is kept."""
    owners = Owners.dividing(MEMORY, new_store, keys=["one", "two"], shared=True)
    yield from serving(ServeSettings(MODEL, owners), native_engine())


def ask(url: str, key: str = "none", prompt: Any = LONG, **change: Any) -> httpx.Response:
    """The response to a greedy request that asks for its rounds."""
    body = {"model": MODEL, "max_tokens": 24, "temperature": 0, "knn_ssd": {"rounds": True}, **change}
    path, text = ("chat/completions", "messages") if isinstance(prompt, list) else ("completions", "prompt")
    headers = {"authorization": f"Bearer {key}"}
    response = httpx.post(f"{url}/v1/{path}", json={**body, text: prompt}, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return response


def used(response: httpx.Response) -> tuple[bool, int]:
    """Whether a response used a prefix cache, and how many earlier requests."""
    said = response.json()
    neighbours = said["knn_ssd"]["neighbours"]
    assert response.headers["x-knn-ssd-neighbours"] == str(len(neighbours))
    return said["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, len(neighbours)


def sources(response: httpx.Response) -> set[str]:
    return {token["source"] for each in response.json()["knn_ssd"]["rounds"] for token in each["tokens"]}


def test_a_client_s_prompts_are_reused_for_its_own_requests_alone(two: Served) -> None:
    first, other, again = ask(two.url, "one"), ask(two.url, "two"), ask(two.url, "two")
    assert used(first) == (False, 0)
    assert used(other) == (False, 0)
    assert "retrieval" not in sources(other)
    assert used(again) == (True, 1)
    assert "retrieval" in sources(again)
    texts = [each.json()["choices"][0]["text"] for each in (first, other, again)]
    assert texts == [native_engine().generate(LONG, max_new_tokens=24, plain=True, chat=False).text] * 3


def test_keys_that_share_reuse_each_other_s_prompts(shared: Served) -> None:
    assert used(ask(shared.url, "one")) == (False, 0)
    assert used(ask(shared.url, "two")) == (True, 1)
    wrong = httpx.post(f"{shared.url}/v1/completions", json={}, headers={"authorization": "Bearer three"})
    assert wrong.status_code == 401


def test_a_request_that_is_not_to_be_stored_neither_uses_nor_leaves_anything(two: Served) -> None:
    ask(two.url, "one")
    assert used(ask(two.url, "one", store=False)) == (False, 0)
    assert used(ask(two.url, "two", store=False)) == (False, 0)
    assert used(ask(two.url, "two", store=None)) == (False, 0)
    assert used(ask(two.url, "two", store=True)) == (True, 1)


def test_rounds_name_the_earlier_request_that_their_tokens_come_from(two: Served) -> None:
    messages = [{"role": "user", "content": "why is the sky blue?"}]
    ask(two.url, "one", messages)
    response = ask(two.url, "one", messages, n=2)
    neighbours = response.json()["knn_ssd"]["neighbours"]
    assert [each["prompt"] for each in neighbours] == ["why is the sky blue?"]
    assert neighbours[0]["distance"] == pytest.approx(0, abs=1e-5)
    assert isinstance(neighbours[0]["id"], int)
    rounds = response.json()["knn_ssd"]["rounds"]
    copied = [each for each in rounds if any(token["source"] == "retrieval" for token in each["tokens"])]
    assert {each["index"] for each in copied} == {0, 1}
    assert {each["neighbour"] for each in copied} <= {0, None}  # None: the other answer of the same request
    assert 0 in {each["neighbour"] for each in copied}
    assert all(each["neighbour"] is None for each in rounds if each["drafted"] == 0)


def test_a_stream_names_its_neighbours_first(two: Served) -> None:
    ask(two.url, "one")
    lines = ask(two.url, "one", stream=True).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: "))["knn_ssd"] for line in lines if '"knn_ssd"' in line]
    assert [each["prompt"] for each in events[0]["neighbours"]] == [LONG.strip()]
    assert not any("neighbours" in each for each in events[1:])
    rounds = [each for each in events if "tokens" in each]
    assert {each["neighbour"] for each in rounds if "retrieval" in {t["source"] for t in each["tokens"]}} == {0}


def test_counters_say_which_drafter_drafted(two: Served) -> None:
    ask(two.url, "one")
    ask(two.url, "one")
    lines = httpx.get(f"{two.url}/metrics").text.splitlines()
    counts = {line.split()[0]: float(line.split()[1]) for line in lines if "_tokens_total{" in line}
    accepted = counts['knn_ssd_accepted_tokens_total{drafter="retrieval"}']
    assert 0 < accepted <= counts['knn_ssd_drafted_tokens_total{drafter="retrieval"}']


# --- Owners


def test_memory_is_divided_equally_among_the_keys() -> None:
    owners = Owners.dividing(3000, new_store, keys=["a", "b", "c"])
    found = [owners.find(key) for key in "abc"]
    for owner in found:
        assert owner is not None
        assert owner.prefix_cache is not None
        assert owner.prefix_cache.max_bytes == 1000
        assert owner.answers is not None
        assert owner.answers.max_tokens == DEFAULT_MAX_TOKENS // 3
    assert len({id(owner) for owner in found}) == 3
    assert owners.find("d") is None
    assert owners.find("") is None


def test_all_keys_are_one_owner_if_they_share() -> None:
    owners = Owners.dividing(3000, new_store, keys=["a", "b"], shared=True)
    assert owners.find("a") is owners.find("b")
    assert owners.find("c") is None


def test_without_keys_every_request_belongs_to_one_owner() -> None:
    owners = Owners.dividing(3000)
    assert owners.find("anything") is owners.find("")
    assert owners.find("") is owners.everyone
    assert (owners.everyone.answers, Owners().everyone) == (None, Owner())


def test_a_store_is_named_by_its_key_s_hash() -> None:
    names: list[str] = []

    def noted(name: str, max_tokens: int) -> AnswerStore:
        names.append(name)
        return AnswerStore(max_tokens)

    Owners.dividing(0, noted, keys=["secret"])
    Owners.dividing(0, noted, keys=["secret", "other"], shared=True)
    Owners.dividing(0, noted)
    assert names == ["2bb80d537b1da3e3", "shared", "shared"]  # `printf secret | sha256sum`
    assert owner_name("secret") == names[0]


@pytest.mark.parametrize(
    ("text", "keys"), [("", ()), ("a", ("a",)), ("a,b", ("a", "b")), (" a ,\n b\n", ("a", "b")), ("a,a", ("a",))]
)
def test_keys_are_separated_by_commas_or_lines(text: str, keys: tuple[str, ...]) -> None:
    assert read_keys(text) == keys


def test_keys_that_are_only_commas_are_an_error() -> None:
    with pytest.raises(UsageError, match="only commas and spaces"):
        read_keys(" ,")


# --- Texts of prompts

TEMPLATES = {
    "a default system message": "<s>system\nbe kind</s>\n"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant\n",
    "no special tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
    "as Llama": "{% for m in messages %}<s>{{ m.role }}</s>\n{{ m.content }}<pad>{% endfor %}<s>assistant</s>\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_a_conversation_the_last_message_is_shown(name: str) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = TEMPLATES[name]
    engine, texts = Engine(tiny_model(max_position_embeddings=1024), tokenizer), PromptTexts(tokenizer)
    turns = ["hello", "hi there", "why is the sky blue?"]
    roles = ["user", "assistant", "user"]
    conversation = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    assert texts.beginning(engine.encode("hello")) == "hello"
    assert texts.beginning(engine.encode(conversation)) == "why is the sky blue?"
    assert texts.beginning(engine.encode("x" * 300)) == "x" * 80
    assert texts.beginning(engine.encode("once upon a time", chat=False)) == "once upon a time"


def test_without_a_tokenizer_or_template_there_is_what_there_is() -> None:
    assert PromptTexts(None).beginning([5, 6]) == ""
    assert PromptTexts(tiny_tokenizer()).beginning([104, 105]) == "hi"


# --- The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("owners") / "model", hidden_size=96, head_dim=32)


def reused(server: ServerProcess) -> tuple[bool, int]:
    """What a repeated request uses of the first."""
    assert used(ask(server.url)) == (False, 0)
    return used(ask(server.url))


def test_without_keys_nothing_is_kept_on_an_address_that_others_reach(model: Path) -> None:
    with server_process(model, "--host", "0.0.0.0") as own:
        assert reused(own) == (False, 0)
        note = own.log.read_text("utf-8")
    assert "no prefix cache and no answer store: clients without API keys could learn what others asked" in note
    assert "Set KNN_SSD_API_KEY, or give --answers shared" in note


def test_without_keys_all_clients_share_if_they_are_said_to(model: Path) -> None:
    with server_process(model, "--host", "0.0.0.0", "--answers", "shared") as own:
        assert reused(own) == (True, 1)
        assert "note:" not in own.log.read_text("utf-8")


def test_without_keys_a_loopback_address_has_a_prefix_cache_alone(model: Path) -> None:
    with server_process(model) as own:
        assert reused(own) == (True, 0)
        assert "note: no answer store: clients without API keys" in own.log.read_text("utf-8")


def test_keys_come_from_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_SSD_API_KEY", "one,two")
    with server_process(model, "--no-answers") as own:
        assert httpx.get(f"{own.url}/v1/models").status_code == 401
        assert [used(ask(own.url, key)) for key in ("one", "two", "two")] == [(False, 0), (False, 0), (True, 0)]
        assert "note:" not in own.log.read_text("utf-8")


def test_answers_in_a_folder_outlast_the_server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kept"
    monkeypatch.setenv("KNN_SSD_API_KEY", "one,two")
    with server_process(model, "--answers", str(folder)) as own:
        first = ask(own.url, "one")
        assert used(first) == (False, 0)
    assert sorted(each.name for each in folder.iterdir()) == sorted([owner_name("one"), owner_name("two")])
    with server_process(model, "--answers", str(folder)) as own:
        other, again = ask(own.url, "two"), ask(own.url, "one")
        assert (used(other), used(again)) == ((False, 0), (False, 1))
        assert "retrieval" in sources(again)
        assert again.json()["choices"] == first.json()["choices"]


def test_without_keys_a_loopback_address_keeps_answers_in_a_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    for near in (0, 1):
        with server_process(model, "--answers", str(folder)) as own:
            assert used(ask(own.url)) == (False, near)
            assert "note:" not in own.log.read_text("utf-8")
    assert [each.name for each in folder.iterdir()] == ["shared"]


def test_keys_that_share_keep_answers_in_one_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    monkeypatch.setenv("KNN_SSD_API_KEY", "one,two")
    with server_process(model, "--answers", str(folder), "--answers", "shared") as own:
        assert [used(ask(own.url, key)) for key in ("one", "two")] == [(False, 0), (True, 1)]
    assert [each.name for each in folder.iterdir()] == ["shared"]


def test_a_folder_that_is_no_answer_store_is_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "answers.sqlite").write_text("not a database" * 100)
    assert main(["serve", "--model", str(model), "--port", "0", "--answers", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "answers.sqlite" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "keys", "sentence"),
    [
        (["--host", "0.0.0.0", "--answers", "kept"], "", "would keep requests of clients without API keys"),
        (["--answers", "kept", "--answers", "other"], "", "--answers takes one folder, got kept and other"),
        (["--answers", "shared", "--no-answers"], "", "not allowed with argument"),
        ([], ",", "the API keys are only commas and spaces"),
    ],
)
def test_options_that_cannot_be_used_are_reported_before_the_model_is_loaded(
    options: list[str], keys: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNN_SSD_API_KEY", keys)
    began = time.monotonic()
    assert main(["serve", "--model", "/nowhere", "--port", "0", *options]) == 2
    assert time.monotonic() - began < 30
    assert sentence in capsys.readouterr().err
