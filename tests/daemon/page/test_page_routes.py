"""The page's files and headers, and what it is told of the traffic."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import pytest
from fastapi.testclient import TestClient
from support.page.page_fakes import BASE, FakeDaemon

from isthmus.daemon import disk_room
from isthmus.daemon.adapter_places import PLACES
from isthmus.daemon.page.page_routes import LOOK_BYTES
from isthmus.daemon.page.static_files import FOLDER, POLICY, is_unchanged, read_static_files
from isthmus.daemon.state.owners import READ_EVERY, give_token
from isthmus.daemon.state.tables import Model, Owner, StoredFile
from isthmus.daemon.web.application import application
from isthmus.edge.config.training_config import TrainConfig
from isthmus.privacy.ledger.mode_leaks import CLOUD_READS

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    made = FakeDaemon(tmp_path / "home")
    yield made
    made.context.database.close()


@pytest.fixture
def client(fake: FakeDaemon) -> TestClient:
    return TestClient(application(fake.context, fake.routers()), base_url="http://127.0.0.1")


def _authorized(fake: FakeDaemon) -> dict[str, str]:
    return {"authorization": f"Bearer {fake.token}"}


def test_the_page_and_its_files_need_no_token_and_have_the_policy(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in re.findall(r'(?:href|src)="(static/[^"]+)"', page.text):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_file_that_a_client_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/static/style.css")
    again = client.get("/static/style.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == POLICY
    assert client.get("/static/style.css", headers={"if-none-match": '"another"'}).status_code == 200


def test_a_tag_is_found_among_others_and_where_it_is_weak() -> None:
    file = read_static_files()["style.css"]
    assert is_unchanged(file, f'"x", W/{file.etag}')
    assert is_unchanged(file, "*")
    assert not is_unchanged(file, None)


@pytest.mark.parametrize(
    "name", ["../page_routes.py", "%2e%2e/page_routes.py", "..%2fpage_routes.py", "%2e%2e%2f__init__.py", "nothing.js"]
)
def test_no_path_leads_out_of_the_folder(client: TestClient, fake: FakeDaemon, name: str) -> None:
    answer = client.get(f"/static/{name}", headers=_authorized(fake))
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_the_traffic_needs_a_token(client: TestClient, fake: FakeDaemon) -> None:
    assert client.get("/isthmus/v1/traffic").status_code == 401
    assert client.get("/isthmus/v1/traffic", headers=_authorized(fake)).status_code == 200


def test_the_traffic_says_what_crossed_and_which_parts_live_where(client: TestClient, fake: FakeDaemon) -> None:
    empty = client.get("/isthmus/v1/traffic", headers=_authorized(fake)).json()
    assert empty["clouds"] == [
        {"name": "main", "reachable": None, "error": None, "model": None, "plan": None}
        | dict.fromkeys(("bytes_up", "bytes_down", "calls", "retries"), 0)
    ]
    fake.know_cloud()
    fake.cross(100, 200, 3)
    found = client.get("/isthmus/v1/traffic", headers=_authorized(fake)).json()
    (cloud,) = found["clouds"]
    assert cloud["plan"] == {"n_layers": 30, "first": 2, "last": 2}
    assert (cloud["model"], cloud["reachable"]) == ("smollm2-135m", True)
    assert found["today"] == found["total"] == {key: cloud[key] for key in found["today"]}
    assert found["today"]["bytes_up"] == 12_345_778
    assert found["adapters"] == "here"


@pytest.mark.parametrize("place", PLACES)
def test_where_adapters_have_been_is_told_after_a_restart_and_to_their_owner_alone(
    tmp_path: Path, fake: FakeDaemon, place: str
) -> None:
    fake.put_adapter(place)
    fake.put_adapter("here")  # what was told is not taken back
    other = give_token(fake.context.database, "other")
    fake.context.database.close()
    again = FakeDaemon(tmp_path / "home", training_layers="edge")
    client = TestClient(application(again.context, again.routers()), base_url="http://127.0.0.1")
    assert client.get("/isthmus/v1/traffic", headers=_authorized(again)).json()["adapters"] == place
    told = client.get("/isthmus/v1/traffic", headers={"authorization": f"Bearer {other}"}).json()
    assert told["adapters"] == "here"
    again.context.database.close()


def test_counters_are_told_to_the_first_owner_alone(
    client: TestClient, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads them again and again sees when somebody works."""
    monkeypatch.setattr(disk_room, "COUNT_EVERY", 0.0)
    fake.know_cloud()
    second = {"authorization": f"Bearer {give_token(fake.context.database, 'second')}"}
    paths = ("/isthmus/v1/traffic", "/isthmus/v1/status")
    seen: dict[str, list[object]] = {"first": [], "second": []}
    for n in range(2):
        fake.cross(1_000_000, 2_000_000, 5)
        now = {"reachable": not n, "error": "broke" if n else None, "since": n, "until": n}
        there = {"reachable": True, "error": None, "since": None}
        works = {"name": "main", "model": BASE, **now, "bytes_up": n, "bytes_down": n, "seen": there}
        fake.context.noted.answers = {"pid": n, "rss_bytes": n, "hot": ["x"] * n, "asked_at": n, "clouds": [works]}
        (fake.context.home.path / "files" / "more").write_bytes(bytes((n + 1) << 20))
        for name, headers in (("first", _authorized(fake)), ("second", second)):
            answers = [client.get(path, headers=headers).json() for path in paths]
            answers[1]["disk"].pop("free_bytes")  # the test's disk is others', too
            seen[name].append(answers)
    assert seen["first"][0] != seen["first"][1]
    assert seen["second"][0] == seen["second"][1]
    assert "bytes_up" not in str(seen["second"])
    assert "until" not in str(seen["second"])


def test_a_code_is_exchanged_for_the_first_owners_token_once(client: TestClient, fake: FakeDaemon) -> None:
    code = fake.context.sign_in.make()

    def post(code: str, **headers: str) -> httpx.Response:
        return client.post("/isthmus/v1/sign-in", json={"code": code}, headers=headers)

    assert post(code, origin="http://elsewhere.example").status_code == 403
    assert post("x" * 43).json()["error"]["code"] == "used_code"
    assert post("x" * 65).status_code == 400
    assert post("x" * 1024).status_code == 413
    assert client.get("/isthmus/v1/sign-in").status_code == 401
    answer = post(code, origin="http://127.0.0.1")
    assert answer.json() == {"token": fake.token}
    assert answer.headers["cache-control"] == "no-store"
    again = post(code)
    assert again.status_code == 403
    assert "was used already, or is older than 10 minutes" in again.json()["error"]["message"]


def test_an_adapter_is_downloaded_by_its_owner_alone(client: TestClient, fake: FakeDaemon) -> None:
    name = fake.add_adapter({"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(3 << 19)})
    address = f"/isthmus/v1/adapters/{name}"
    answer = client.get(address, headers=_authorized(fake))
    with ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert {entry.filename: entry.file_size for entry in archive.infolist()} == {
            "adapter_config.json": 2,
            "adapter_model.safetensors": 3 << 19,
        }
    other = {"authorization": f"Bearer {give_token(fake.context.database, 'other')}"}
    time.sleep(READ_EVERY)
    assert client.get(address, headers=other).status_code == 404
    with fake.context.database.session() as session:
        session.get_one(Model, name).deleted = True
    assert client.get(address, headers=_authorized(fake)).status_code == 404


def test_the_first_examples_of_a_file_are_shown_as_a_job_reads_them(client: TestClient, fake: FakeDaemon) -> None:
    def look(**wanted: str) -> Any:
        return client.post("/isthmus/v1/look", json=wanted, headers=_authorized(fake))

    table = 'ticket,queue\n"twice,\nagain",billing\n' + "late,delivery\n" * 9
    templates = {"prompt_template": "Ticket: {ticket}", "completion_template": " {queue}"}
    examples = look(name="t.csv", text=table, **templates).json()["examples"]
    first = {"prompt": "Ticket: twice,\nagain", "completion": " billing", "messages": []}
    assert examples == [first, *2 * [{"prompt": "Ticket: late", "completion": " delivery", "messages": []}]]
    chat = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    assert look(name="t.jsonl", text=chat).json()["examples"][0]["messages"] == [["user", "q"], ["assistant", "a"]]
    for wanted, problem in (
        ({"name": "t.csv", "text": table}, "t.csv, line 2: none of the keys 'ticket', 'queue'"),
        ({"name": "t.jsonl", "text": "no JSON"}, "t.jsonl, line 1: not JSON"),
        ({"name": "t.txt", "text": "x"}, "the form of 't.txt' is not clear"),
        ({"name": "t.csv", "text": table, "prompt_template": "{ticket}"}, "a prompt needs a completion"),
    ):
        assert problem in look(**wanted).json()["problem"]
    # A stored file is read at its beginning alone, and is its owner's.
    stored = StoredFile(id="file-1", filename="t.jsonl", purpose="user_data", size=9 << 16, sha256="", created_at=1.0)
    with fake.context.database.session() as session:
        stored.owner = session.query(Owner).one().id
        session.add(stored)
    fake.context.home.file("file-1").write_bytes(b'{"text": "one"}\n{"text": "%s"}' % (b"x" * (8 << 16)))
    assert [example["completion"] for example in look(file="file-1").json()["examples"]] == ["one"]
    assert look(file="file-2").status_code == 404
    assert look(name="t.jsonl", text="x" * (LOOK_BYTES + 1)).status_code == 400
    assert list(fake.context.home.uploads.iterdir()) == []


def _addresses(text: str) -> set[str]:
    return set(re.findall(r"(?:https?:)?//[\w.-]+", re.sub(r"(?m)^\s*//.*$", "", text)))


def test_the_files_name_no_other_origin_and_put_no_html_together() -> None:
    known = {"http://www.w3.org"}  # the namespace of SVG: a name, which nobody fetches
    for name, text in TEXTS.items():
        assert _addresses(text) <= known, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert not re.search(r'\son[a-z]+="|\sstyle="|<script>|<style>', text), name


def test_the_page_says_what_a_cloud_reads_in_the_words_of_the_readme() -> None:
    assert f'CLOUD_READS = "{CLOUD_READS}"' in TEXTS["formats.js"]
    for name in ("app.js", "crossed.js", "jobs.js"):
        assert "CLOUD_READS" in TEXTS[name], name
    for name, text in TEXTS.items():
        assert not re.search("stays? on this machine", text), name


def test_an_address_elsewhere_is_noticed() -> None:
    assert _addresses('import "https://cdn.example/x.js"; // said\n// see https://nowhere') == {"https://cdn.example"}


# Contrast by WCAG 2.2: relative luminance, and the ratio of success criteria 1.4.3 (text) and 1.4.11 (controls).

TEXT = 4.5
CONTROL = 3.0
PAIRS = [
    *itertools.product(["text", "muted", "accent"], ["ground", "surface"], [TEXT]),
    *itertools.product(["text", "muted"], ["sunk"], [TEXT]),
    *itertools.product(["text", "accent", "muted"], ["accent-soft"], [TEXT]),
    ("text", "second-soft", TEXT),
    ("muted", "second-soft", TEXT),
    ("on-accent", "accent", TEXT),
    ("surface", "bad", TEXT),
    *itertools.product(["bad"], ["surface", "ground", "bad-soft"], [TEXT]),
    ("second", "surface", TEXT),
    *itertools.product(["control"], ["surface", "ground"], [CONTROL]),
    *itertools.product(["accent", "second"], ["surface", "ground"], [CONTROL]),
]


def _colours(css: str) -> dict[str, dict[str, str]]:
    """The variables of each theme."""
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme)) for theme in (light, dark)]
    return {"light": found[0], "dark": found[1]}


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_form_shows_the_defaults_of_edge_train() -> None:
    shown = re.findall(r'numberInput\("(\w+)", \{[^}]*placeholder: "([^"]+)"', TEXTS["new_job.js"])
    assert {"learning_rate", "rank", "batch"} <= dict(shown).keys()
    assert {name: float(text) for name, text in shown} == {
        name: TrainConfig.model_fields[name].default for name, _ in shown
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme: str) -> None:
    colours = _colours(TEXTS["style.css"])[theme]
    faint = {
        (front, back): round(ratio, 2)
        for front, back, least in PAIRS
        if (ratio := _contrast(colours[front], colours[back])) < least
    }
    assert faint == {}


def test_contrast_is_that_of_the_guidelines() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the well-known grey that fails
