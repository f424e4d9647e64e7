"""Push and pull against a small Hub of our own on 127.0.0.1, through the real client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub.utils import close_session

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.errors import AtlasError, KnnSsdError, OutputError, UsageError
from knn_ssd.loading.fingerprint import Fingerprint
from knn_ssd.plan import Plan, Policy
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.tools import hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # between the client and its httpx

TOKEN = "hf_fake"
REPO = "ada/smollm2-atlas"


@dataclass
class Repo:
    """A repository: branches of commits of files."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches[branch]
        oid = hashlib.sha1(f"{parent}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {**self.commits[parent], **files}
        self.branches[branch] = oid
        return oid

    def oid(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


@dataclass
class FakeHub:
    """What the server holds and has seen."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    may_write: bool = True
    url: str = ""
    cuts: list[int] = field(default_factory=list)  # bytes of the anchors to send before the line drops, by attempt


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's API that the client needs for models."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[FakeHub]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, **match.groupdict())
        return self._fail(404, "no such route")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _fail(self, status: int, message: str, code: str = "") -> None:
        self._json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _authorised(self) -> bool:
        sent = self.headers.get("Authorization")
        if sent not in (None, f"Bearer {TOKEN}"):
            self._fail(401, "Invalid credentials in Authorization header")
            return False
        return True

    def _repo(self, name: str) -> Repo | None:
        """The repository, or None after an answer that says why not."""
        if not self._authorised():
            return None
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            self._fail(404 if self.headers.get("Authorization") else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._authorised():
            return
        if not self.hub.may_write:
            self._fail(403, "You don't have the rights to create a model under this namespace")
        elif name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        else:
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str | None = None) -> None:
        if (repo := self._repo(name)) is None:
            return
        oid = repo.oid(revision or "main")
        if oid is None:
            self._fail(404, "Invalid rev id", "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in repo.commits[oid]]
        self._json({"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})

    def branch(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is not None:
            repo.branches[revision] = repo.branches["main"]
            self._json({})

    def validate(self) -> None:
        self._json({"warnings": [], "errors": []})

    def preupload(self, name: str, revision: str) -> None:
        if self._repo(name) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, name: str) -> None:
        objects = [
            {**thing, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}"}}}
            for thing in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send(200, b"")

    def commit(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        files: dict[str, bytes] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = repo.commit(revision, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        oid = repo.oid(revision)
        if oid is None or file not in repo.commits[oid]:
            self._fail(404, "Entry not found", "EntryNotFound")
            return
        content = repo.commits[oid][file]
        cut_short = self.command == "GET" and file == "anchors.safetensors" and self.hub.cuts
        keep = self.hub.cuts.pop(0) if cut_short else None
        if keep == 0:
            self._fail(500, "the disk is on fire")
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content[:keep], Content_Length=str(len(content)), ETag=etag, X_Repo_Commit=oid)
        self.close_connection = keep is not None


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>.+?)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("POST", rf"/api/models/{NAME}/branch/{REVISION}", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("GET HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<file>[^/]+)", Handler.resolve),
]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token, cache, proxy or xet of the machine's own; no memory of closed servers."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it asks the real Hub for a list
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no_cache"))
    close_session()
    yield
    close_session()


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    state = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url + "/")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


def make_atlas(**overrides: Any) -> Atlas:
    generator = np.random.default_rng(0)
    settings: dict[str, Any] = {
        "fingerprint": Fingerprint("LlamaForCausalLM", 4, 8, 128, "0123abcd", "4567", "float32"),
        "pooling": Pooling.MEAN,
        "anchors": generator.normal(size=(3, 8)).astype(np.float32),
        "anchor_domains": ("math", "math", "a|b"),
        "domains": {
            "math": DomainEntry(Plan.skipping(4, [1, 3], [2], Policy(5, 0.6)), 0.2, {"trials": 7}),
            "a|b": DomainEntry(Plan.plain(4), 0.1),
        },
        "fallback": Plan.skipping(4, [3]),
        "cost": CostProfile(0.01, 0.001, 0.002, (0.01, 0.011)),
        "evidence": {"model": "ada/smollm2"},
        "vectors": generator.normal(size=(6, 8)).astype(np.float32),
        "vector_domains": ("math",) * 4 + ("a|b",) * 2,
    }
    return Atlas(**{**settings, **overrides})


@pytest.fixture
def atlas_dir(tmp_path: Path) -> Path:
    return make_atlas().save(tmp_path / "atlas")


def refusal(call: Callable[[], object], kind: type[KnnSsdError]) -> str:
    """What a failing call says, which must be one sentence with a remedy, and soon."""
    started = time.perf_counter()
    with pytest.raises(kind) as caught:
        call()
    assert time.perf_counter() - started < 10
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leftovers(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"atlas"}


# ---- There and back


def test_a_pushed_atlas_comes_back_equal(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    assert hub.push(atlas_dir, REPO) == f"{fake_hub.url}/{REPO}"
    out = hub.pull(REPO, tmp_path / "below" / "pulled")
    assert {path.name for path in out.iterdir()} == set(hub.FILES)
    for name in hub.FILES:
        assert (out / name).read_bytes() == (atlas_dir / name).read_bytes()
    before, after = Atlas.load(atlas_dir), Atlas.load(out)
    assert (after.domains, after.fallback, after.fingerprint) == (before.domains, before.fallback, before.fingerprint)
    np.testing.assert_array_equal(after.anchors, before.anchors)


def test_push_uploads_the_atlas_and_its_card_and_nothing_else(fake_hub: FakeHub, atlas_dir: Path) -> None:
    (atlas_dir / "notes.txt").write_text("mine")
    hub.push(atlas_dir, REPO)
    repo = fake_hub.repos[REPO]
    assert set(repo.files()) == {".gitattributes", "atlas.json", "anchors.safetensors", "README.md"}
    assert len(repo.commits) == 2  # one commit, so that no pull gets half an atlas
    assert not repo.private


def test_a_second_push_replaces_the_first(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    hub.push(atlas_dir, REPO)
    newer = make_atlas(fallback=Plan.plain(4)).save(tmp_path / "newer")
    hub.push(newer, REPO)
    assert Atlas.load(hub.pull(REPO, tmp_path / "pulled")).fallback == Plan.plain(4)


def test_revisions(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    hub.push(atlas_dir, REPO)
    first = fake_hub.repos[REPO].branches["main"]
    newer = make_atlas(fallback=Plan.plain(4)).save(tmp_path / "newer")
    assert hub.push(newer, REPO, revision="try/2") == f"{fake_hub.url}/{REPO}/tree/try/2"
    for revision, fallback in (
        (None, Plan.skipping(4, [3])),
        ("try/2", Plan.plain(4)),
        (first, Plan.skipping(4, [3])),
    ):
        assert Atlas.load(hub.pull(REPO, tmp_path / f"at-{revision and revision[:3]}", revision=revision)).fallback == (
            fallback
        )


def test_a_private_atlas_needs_the_token(
    fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(atlas_dir, REPO, private=True)
    assert fake_hub.repos[REPO].private
    hub.pull(REPO, tmp_path / "pulled")
    monkeypatch.delenv("HF_TOKEN")
    assert "or it is private" in refusal(lambda: hub.pull(REPO, tmp_path / "again"), AtlasError)


def test_a_public_atlas_needs_none(
    fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(atlas_dir, REPO)
    monkeypatch.delenv("HF_TOKEN")
    hub.pull(REPO, tmp_path / "pulled")


def test_the_card_shows_model_domains_and_plans() -> None:
    text = hub.card(make_atlas(), REPO)
    header, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "- knn-ssd" in header
    assert "LlamaForCausalLM" in header
    assert body.startswith("\n# Atlas of ada/smollm2\n")
    assert "| math | skip attention 1, 3 and MLP 2; drafts up to 5 while confidence >= 0.6 | 38 % |" in body
    assert "| a\\|b | plain decoding | 0 % |" in body
    assert "| *fallback* | skip attention 3;" in body
    assert f"knn-ssd atlas pull {REPO} --out ATLAS" in body


@pytest.mark.parametrize("name", ["/home/ada/secret/model", "./model", "~/model", "a/b/c", "C:\\ada\\model", ""])
def test_the_card_does_not_show_a_path_of_the_machine(name: str) -> None:
    text = hub.card(make_atlas(evidence={"model": name}), REPO)
    assert "# Atlas of LlamaForCausalLM\n" in text
    assert not name or name not in text


# ---- Refused before anything is sent


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a b/c", "ada/two--dashes", "../x", "", "ada/", "/x"])
def test_not_an_id(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, repo: str) -> None:
    assert "Give owner/name" in refusal(lambda: hub.push(atlas_dir, repo), UsageError)
    assert "Give owner/name" in refusal(lambda: hub.pull(repo, tmp_path / "pulled"), UsageError)
    assert not fake_hub.requests
    assert not leftovers(tmp_path)


def test_a_damaged_atlas_is_not_pushed(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    (atlas_dir / "anchors.safetensors").write_bytes(b"broken")
    refusal(lambda: hub.push(atlas_dir, REPO), AtlasError)
    refusal(lambda: hub.push(tmp_path / "nothing", REPO), AtlasError)
    assert not fake_hub.requests


def test_push_without_a_token(fake_hub: FakeHub, atlas_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(lambda: hub.push(atlas_dir, REPO), OutputError)
    assert not fake_hub.requests


def test_pull_does_not_overwrite(fake_hub: FakeHub, atlas_dir: Path) -> None:
    before = (atlas_dir / "atlas.json").read_bytes()
    refusal(lambda: hub.pull(REPO, atlas_dir), OutputError)
    assert (atlas_dir / "atlas.json").read_bytes() == before
    assert not fake_hub.requests


def test_offline_mode(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError)
    assert "HF_HUB_OFFLINE" in refusal(lambda: hub.push(atlas_dir, REPO), OutputError)


# ---- Refused by the Hub, or by what is there


def test_a_public_repository_does_not_take_a_private_atlas(fake_hub: FakeHub, atlas_dir: Path) -> None:
    hub.push(atlas_dir, REPO)
    commits = len(fake_hub.repos[REPO].commits)
    assert "public" in refusal(lambda: hub.push(atlas_dir, REPO, private=True), UsageError)
    assert len(fake_hub.repos[REPO].commits) == commits


def test_a_repository_of_something_else_is_left_alone(fake_hub: FakeHub, atlas_dir: Path) -> None:
    fake_hub.repos[REPO] = Repo()
    fake_hub.repos[REPO].commit("main", {"model.safetensors": b"weights", "README.md": b"a model"})
    assert "model.safetensors" in refusal(lambda: hub.push(atlas_dir, REPO), UsageError)
    assert fake_hub.repos[REPO].files()["README.md"] == b"a model"


def test_a_repository_that_is_not_there(fake_hub: FakeHub, tmp_path: Path) -> None:
    text = refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError)
    assert text == (
        f"there is no '{REPO}' on the Hub, or it is private. Check the spelling. "
        "Log in with `hf auth login`, or set HF_TOKEN."
    )
    assert not leftovers(tmp_path)


def test_a_revision_that_is_not_there(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    hub.push(atlas_dir, REPO)
    assert "'v9'" in refusal(lambda: hub.pull(REPO, tmp_path / "pulled", revision="v9"), AtlasError)
    assert not leftovers(tmp_path)


def test_a_repository_that_is_not_an_atlas(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos[REPO] = Repo()
    assert "has no atlas.json" in refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError)
    assert not leftovers(tmp_path)


def test_a_wrong_token(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    for call, kind in (
        (lambda: hub.push(atlas_dir, REPO), OutputError),
        (lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError),
    ):
        text = refusal(call, kind)
        assert "does not accept the token" in text
        assert "hf auth login" in text
        assert "hf_stale" not in text
    assert not leftovers(tmp_path)


def test_no_permission(fake_hub: FakeHub, atlas_dir: Path) -> None:
    fake_hub.may_write = False
    text = refusal(lambda: hub.push(atlas_dir, REPO), OutputError)
    assert "don't have the rights" in text
    assert "hf auth login" in text


def test_no_hub_at_all(atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert "cannot be reached" in refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError)
        assert "cannot be reached" in refusal(lambda: hub.push(atlas_dir, REPO), OutputError)
    assert not leftovers(tmp_path)


# ---- Nothing half-written


def test_a_download_that_breaks_off_leaves_nothing(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    hub.push(atlas_dir, REPO)
    fake_hub.cuts = [40, 0]
    assert "status 500: the disk is on fire" in refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError)
    assert not leftovers(tmp_path)


def test_a_download_that_breaks_once_is_resumed(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    hub.push(atlas_dir, REPO)
    fake_hub.cuts = [40]
    out = hub.pull(REPO, tmp_path / "pulled")
    assert (out / "anchors.safetensors").read_bytes() == (atlas_dir / "anchors.safetensors").read_bytes()


def test_an_interrupted_download_leaves_nothing(fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path) -> None:
    hub.push(atlas_dir, REPO)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knn_ssd.tools.hub._check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hub.pull(REPO, tmp_path / "pulled")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"anchors.safetensors": b"broken"}, "damaged"),
        ({"atlas.json": b'{"schema": 99}'}, "Update knn-ssd"),
        ({"atlas.json": b"{"}, "is not JSON"),
    ],
)
def test_a_damaged_atlas_is_not_installed(
    fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, damage: dict[str, bytes], said: str
) -> None:
    hub.push(atlas_dir, REPO)
    fake_hub.repos[REPO].commit("main", damage)
    text = refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), AtlasError)
    assert said in text
    assert f"'{REPO} on the Hub" in text
    assert str(tmp_path) not in text
    assert not leftovers(tmp_path)


def test_a_full_disk_is_not_blamed_on_the_hub(
    fake_hub: FakeHub, atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(atlas_dir, REPO)

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("knn_ssd.tools.hub.os.replace", no_room)
    assert "No space left on device" in refusal(lambda: hub.pull(REPO, tmp_path / "pulled"), OutputError)
    assert not leftovers(tmp_path)
