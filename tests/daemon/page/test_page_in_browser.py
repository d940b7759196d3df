"""The page in a real browser, on a daemon whose jobs and answers do what a test says.

Its screenshots are kept in the folder that `ISTHMUS_SCREENSHOTS` names, or in the test's own, which is printed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from playwright.sync_api import Browser, Error, Page, expect
from support.page.browsers import Watched, chromium
from support.page.page_fakes import BASE, FakeDaemon

from isthmus.daemon.state.owners import READ_EVERY, give_token
from isthmus.privacy.ledger.mode_leaks import CLOUD_READS

pytestmark = pytest.mark.browser

LINES = '{"prompt": "Ticket: charged twice", "completion": " billing"}\n' * 12
OUTLINE = "(({ outlineStyle, outlineWidth }) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
ASK_ELSEWHERE = """new Promise((done) => {
  addEventListener("securitypolicyviolation", done);
  document.body.append(Object.assign(new Image(), { src: "http://elsewhere.example/a.png" }));
})"""
MARKUP = '<img src=x onerror="told(1)">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path / "home")
    daemon.know_cloud()
    with daemon.served():
        yield daemon


Opener = Callable[..., Watched]


@pytest.fixture
def watch(browser: Browser, fake: FakeDaemon) -> Iterator[Opener]:
    """Opens pages; those that are not allowed to have faults must have none in the end."""
    opened: list[tuple[Watched, bool]] = []

    def open_page(*, faults: bool = False, **options: Any) -> Watched:
        found = Watched(browser, fake.url, **options)
        opened.append((found, faults))
        return found

    yield open_page
    for found, may in opened:
        found.close()
        assert may or found.faults == []


def _job(fake: FakeDaemon, steps: int = 0, suffix: str = "tickets") -> str:
    name = str(fake.add_job({"kind": "train", "model": BASE, "suffix": suffix})["id"])
    fake.advance(name, steps)
    return name


def _see_points(page: Page, number: int) -> None:
    """Wait until the training curve has so many points."""
    drawn = re.compile(rf"^M[^ML]+(L[^ML]+){{{number - 1}}}$")
    expect(page.locator(".line-train")).to_have_attribute("d", drawn)


def test_a_job_is_started_by_the_form_watched_over_a_reload_and_cancelled(
    fake: FakeDaemon, watch: Opener, tmp_path: Path
) -> None:
    watched = watch(faults=True)
    page = watched.open(fake.token)
    page.click("text=Start the first job")
    page.click("text=Start the job")
    expect(page.locator(".error", has_text="Choose a file")).to_be_visible()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\nnot JSON\n', encoding="utf-8")
    page.get_by_label("File", exact=True).set_input_files(bad)
    expect(page.locator(".error", has_text="Line 2 is not JSON")).to_be_visible()
    good = tmp_path / "tickets.jsonl"
    good.write_text(LINES, encoding="utf-8")
    page.get_by_label("File", exact=True).set_input_files(good)
    expect(page.locator(".hint", has_text="12 examples; keys: prompt, completion")).to_be_visible()
    expect(page.locator(".first li").first).to_have_text("promptTicket: charged twicecompletion, learned billing")
    page.get_by_label("Name").fill("tickets")
    page.get_by_label("Length", exact=True).fill("40")
    page.get_by_label("Unit of the length").select_option("steps")
    page.click("text=More settings")
    page.get_by_label("Learning rate").fill("5")
    page.click("text=Start the job")
    # The daemon's refusal stands beside its field, which has the focus.
    expect(page.locator(".error", has_text="learning_rate = 5 is more than 1")).to_be_visible()
    expect(page.get_by_label("Learning rate")).to_be_focused()
    assert watched.problems.pop().startswith("Failed to load resource")  # the browser notes the status 400
    page.get_by_label("Learning rate").fill("0.001")
    page.click("text=Start the job")

    expect(page.locator("h1")).to_have_text("tickets")
    (name,) = fake.jobs
    (data,) = [file["id"] for file in fake.files]
    assert fake.jobs[name]["spec"] == {"steps": 40, "learning_rate": 0.001, "data": data}
    expect(page.locator(".pill")).to_have_text("queued")
    fake.advance(name, 8)
    _see_points(page, 8)
    fake.advance(name, 4)
    _see_points(page, 12)
    expect(page.locator(".stat", has_text="Step")).to_contain_text("12 of 40")
    expect(page.locator(".dot-validation")).to_have_count(1)
    expect(page.get_by_role("link", name="Talk to the checkpoint of step 10")).to_be_visible()
    expect(page.locator(".saved-loss")).to_have_text(re.compile(r"training \d\.\d{3} · validation \d\.\d{3}"))

    page.reload()
    expect(page.locator("h1")).to_have_text("tickets")
    _see_points(page, 12)
    fake.advance(name, 1)
    _see_points(page, 13)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".pill")).to_have_text("paused")
    expect(page.locator(".bar progress")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator(".pill")).to_have_text("paused")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator(".pill")).to_have_text("cancelled")
    expect(page.locator("#said")).to_have_text(re.compile("cancelled"))
    expect(page.locator(".bar progress")).to_be_hidden()
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert watched.faults == []


def test_a_jobs_page_has_its_data_settings_dates_and_adapter_and_deletes_it(
    fake: FakeDaemon, watch: Opener, tmp_path: Path
) -> None:
    fake.files.append({"id": "file-1", "filename": "tickets.jsonl", "bytes": 2048, "purpose": "fine-tune"})
    spec = {"data": "file-1", "steps": 40, "learning_rate": 0.001, "dropout": 0.1}
    name = str(fake.add_job({"kind": "train", "model": BASE, "suffix": "tickets", "spec": spec})["id"])
    fake.tell(name, "Step 0/40: validation loss=3.7000", step=0, valid_loss=3.7)
    fake.advance(name, 40)
    fake.add_adapter({"adapter_config.json": b"{}"}, str(fake.jobs[name]["tuned_model"]))
    watched = watch(faults=True)
    page = watched.open(fake.token, f"job/{name}")
    details = page.locator(".details")
    for row in ("Datatickets.jsonl (2.00 KiB)", "steps40", "learning_rate0.001"):
        expect(details.locator("div", has_text=row)).to_have_text(row)
    expect(details).to_contain_text(re.compile(r"Created.*Begun.*Ended"))
    # Validation begins at step 0, and the smoothed line runs over the single steps.
    _see_points(page, 40)
    expect(page.locator(".line-raw")).to_have_count(1)
    expect(page.locator(".line-validation")).to_have_attribute("d", re.compile(r"^M52\.0 "))
    with page.expect_download() as kept:
        page.get_by_role("button", name="Download the final result").click()
    assert kept.value.suggested_filename == "tickets.zip"
    kept.value.save_as(tmp_path / "tickets.zip")
    with ZipFile(tmp_path / "tickets.zip") as archive:
        assert archive.namelist() == ["adapter_config.json"]
    # The form does it again, with what it has no field for as it was.
    page.get_by_role("button", name="Again with changes").click()
    expect(page.get_by_text("As tickets was, with dropout as there.")).to_be_visible()
    expect(page.get_by_label("Learning rate")).to_have_value("0.001")
    page.get_by_label("Mode", exact=True).select_option("top")
    expect(page.get_by_text("no gradient is sent, and less is learned")).to_be_visible()
    page.get_by_text("Leak budget", exact=True).first.click()
    page.locator("[name=leak_budget]").fill("tokens<=0.5")
    page.click("text=Start the job")
    expect(page.locator(".pill")).to_have_text("queued")
    modules = fake.jobs[list(fake.jobs)[-1]]["spec"]["target_modules"]
    top = {"target_modules": modules, "leak_budget": "tokens<=0.5"}
    assert fake.jobs[list(fake.jobs)[-1]]["spec"] == spec | top
    assert {name.split(".")[1] for name in modules} == {"28", "29"}  # of 30, those that are the edge's at the top
    page.goto(f"{fake.url}/#job/{name}")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the job").click()
    expect(page.locator("h1")).to_have_text("Jobs")
    assert name not in fake.jobs
    # The file's bytes are nowhere here, and the page may ask for the job once more: the browser notes the status.
    assert [problem for problem in watched.faults if "404" not in problem] == []


def test_the_emulator_mode_leaves_to_the_package_what_is_not_said_and_the_job_says_what_crossed(
    fake: FakeDaemon, watch: Opener, tmp_path: Path
) -> None:
    fake.files.append({"id": "file-1", "filename": "tickets.jsonl", "bytes": 2048, "purpose": "fine-tune"})
    watched = watch(faults=True)
    page = watched.open(fake.token, "new")
    page.get_by_label("Training data").select_option("file-1")
    page.get_by_text("Leak budget", exact=True).first.click()
    page.locator("[name=leak_budget]").fill("tokens<=0.5")
    page.get_by_label("Mode", exact=True).select_option("emulator")
    expect(page.get_by_text("no text, activation or gradient is sent")).to_be_visible()
    expect(page.locator("[name=leak_budget]")).to_be_hidden()
    expect(page.get_by_label("Length", exact=True)).to_have_value("")
    page.click("text=Start the job")
    expect(page.locator(".facts")).to_contain_text("Private tuning (emulator)")
    (name,) = fake.jobs
    assert (fake.jobs[name]["kind"], fake.jobs[name]["spec"]) == ("tune", {"data": "file-1"})
    stayed = page.locator(".notice", has_text="Nothing of your data left this machine")
    expect(stayed).to_contain_text("fetches the cloud's package first")
    fake.advance(name, 3)
    fake.jobs[name] |= {"bytes_up": 2048, "bytes_down": 170 << 20}
    crossed = (
        "All that crossed was to ask for the package and to fetch what was missing: 2.00 KiB went, 170 MiB came back."
    )
    expect(stayed).to_contain_text(crossed)
    expect(stayed).to_contain_text("your prompts cross")
    page.get_by_role("button", name="Again with changes").click()
    expect(page.get_by_label("Mode", exact=True)).to_have_value("emulator")
    expect(page.get_by_label("Length", exact=True)).to_have_value("")
    page.get_by_text("Package and public texts").click()
    page.locator("[name=package]").fill("near")
    public = tmp_path / "public.jsonl"
    public.write_text('{"text": "a public text"}\n')
    page.locator("[name=public]").set_input_files(public)
    page.click("text=Start the job")
    expect(stayed).to_contain_text("asks about the public texts")
    bridged = next(job for job in fake.jobs if job != name)
    assert fake.jobs[bridged]["spec"] == {"data": "file-1", "package": "near", "public": fake.files[-1]["id"]}
    fake.advance(bridged, 3)
    fake.jobs[bridged] |= {"bytes_up": 2048, "bytes_down": 2048}
    expect(stayed).to_contain_text("All that crossed was the public texts as activations")
    page.get_by_role("button", name="Again with changes").click()
    expect(page.locator("[name=package]")).to_have_value("near")
    # In split training there is no such sentence, and a length is needed.
    page.get_by_label("Mode", exact=True).select_option("split")
    expect(page.locator("[name=package]")).to_be_hidden()
    expect(page.get_by_label("Length", exact=True)).to_have_value("3")
    page.click("text=Start the job")
    expect(page.locator(".facts")).to_contain_text("Split training")
    expect(page.get_by_text("Nothing of your data left this machine")).to_be_hidden()
    assert fake.jobs[list(fake.jobs)[-1]]["spec"] == {"data": "file-1", "epochs": 3}
    # The file's bytes are nowhere here: the browser notes the status.
    assert [problem for problem in watched.faults if "404" not in problem] == []


def test_a_question_that_comes_before_the_models_names_waits_for_them(fake: FakeDaemon, watch: Opener) -> None:
    watched = watch()
    held: list[Any] = []
    watched.page.route("**/v1/models", lambda route: held.append(route))
    page = watched.open(fake.token, "chat")
    page.get_by_label("Your message").fill("What now?")
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert page.locator(".notice:visible").count() == 0
    for route in held:
        route.continue_()
    expect(page.locator(".said").first).to_have_text(re.compile("base"))


def test_chat_compares_base_and_tuned_and_can_be_stopped(fake: FakeDaemon, watch: Opener) -> None:
    name = _job(fake, 20)
    page = watch().open(fake.token, f"job/{name}")
    page.get_by_role("link", name="Talk to the checkpoint of step 20").click()
    tuned = fake.saved[name][0]["model"]
    expect(page.locator("#right")).to_have_value(tuned)
    expect(page.locator("#left")).to_have_value(BASE)
    expect(page.locator("#right option:checked")).to_have_text("tickets 000000, step 20")
    page.locator("#prompt").fill("Charged twice?")
    page.keyboard.press("Enter")
    left, right = page.locator(".answer").nth(0), page.locator(".answer").nth(1)
    expect(left.locator(".said")).to_contain_text("base: The ticket")
    expect(right.locator(".said")).to_contain_text("tuned: The ticket")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert {body["model"] for body in fake.asked} == {BASE, tuned}

    fake.slow = 0.1
    page.locator("#prompt").fill("And now?")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator(".answer").nth(3).locator(".said")).to_contain_text("tuned")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note", has_text="stopped")).to_have_count(2)
    # Each side's conversation has its own answers.
    sides = {body["model"]: [message["content"][:5] for message in body["messages"]] for body in fake.asked}
    assert sides == {BASE: ["Charg", "base:", "And n"], tuned: ["Charg", "tuned", "And n"]}
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.get_by_role("link", name="Chat", exact=True).click()
    expect(page.locator(".turn")).to_have_count(2)


def test_what_crossed_is_told_as_it_is(fake: FakeDaemon, watch: Opener) -> None:
    page = watch().open(fake.token, "crossed")
    picture = page.locator(".drawing svg")
    expect(picture).to_contain_text("11.8 MiB")
    expect(picture).to_contain_text("26 middle layers")
    expect(page.locator(".stays li")).to_have_text(
        [
            *(f"{what}no message carries it" for what in ("Text and tokens", "Labels", "Optimizer state")),
            "Adaptersnone was in the cloud's layers",
        ]
    )
    expect(page.locator(".honest")).to_contain_text(CLOUD_READS)
    fake.cross(10_000_000, 0, 1)
    expect(picture).to_contain_text("21.3 MiB")
    fake.put_adapter("leased")
    expect(page.locator(".stays .open")).to_contain_text("leased: the cloud has had weights of some")
    spoken = picture.get_attribute("aria-label") or ""
    assert "No message carries text, labels or optimizer state." in spoken


def test_counters_are_shown_to_the_first_owner_alone(fake: FakeDaemon, watch: Opener) -> None:
    second = give_token(fake.context.database, "second")
    time.sleep(READ_EVERY)
    page = watch().open(second, "crossed")
    expect(page.locator(".drawing svg")).to_contain_text("26 middle layers")
    expect(page.get_by_text("The counters are shown to the daemon's first owner alone")).to_be_visible()
    for gone in (page.get_by_text("Today (UTC)"), page.locator("#meter")):
        expect(gone).to_be_hidden()
    text = page.locator("body").inner_text() + (page.locator(".drawing svg").text_content() or "")
    assert not re.search(r"\d [KMG]iB(?! of)(?! on)|NaN|undefined", text), text
    first = watch().open(fake.token, "crossed")
    expect(first.get_by_text("Today (UTC)")).to_be_visible()
    expect(first.locator("#meter")).to_contain_text("11.8 MiB")


def test_it_works_by_keyboard(fake: FakeDaemon, watch: Opener) -> None:
    watched = watch(faults=True)
    page = watched.page
    page.goto(fake.url)
    expect(page.get_by_label("Token")).to_be_focused()
    expect(page.locator(".sign-in")).to_contain_text(CLOUD_READS)
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-error")).to_have_text("The daemon does not know this token.")
    assert watched.problems.pop().startswith("Failed to load resource")  # the browser notes the status 401
    page.keyboard.type(fake.token)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Jobs")
    page.reload()
    seen = []
    for _ in range(7):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.textContent.trim()"))
        style = page.evaluate(OUTLINE)
        assert style == ["solid", "3px"], seen
    assert seen[:5] == ["Skip to the content", "Isthmus", "Jobs", "Chat", "What crossed"]
    page.reload()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("New job")
    assert watched.faults == []


def test_the_token_stays_in_no_address_and_in_no_cookie(fake: FakeDaemon, watch: Opener) -> None:
    watched = watch()
    page = watched.open(fake.token)
    assert "token" not in page.url
    assert watched.context.cookies() == []
    assert page.evaluate("Object.keys(localStorage)") == []
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_an_address_signs_nobody_in_unasked_and_the_page_says_who_is(fake: FakeDaemon, watch: Opener) -> None:
    second = give_token(fake.context.database, "second")
    page = watch().open(fake.token)
    expect(page.locator("#owner")).to_have_text("first")
    for answer, name, token in (("Do not", "first", fake.token), ("Sign in", "second", second)):
        page.goto(f"{fake.url}/#token={second}")
        expect(page.locator("dialog")).to_contain_text("Sign in as “second”?")
        expect(page.locator("dialog")).to_contain_text("Now you are signed in as “first”.")
        assert page.evaluate("sessionStorage['isthmus-token']") == fake.token
        page.get_by_role("button", name=answer, exact=True).click()
        expect(page.locator("dialog")).to_have_count(0)
        expect(page.locator("#owner")).to_have_text(name)
        assert page.evaluate("sessionStorage['isthmus-token']") == token
        assert "token" not in page.url
    watched = watch(faults=True)
    fresh = watched.page  # nobody is signed in here
    fresh.goto(f"{fake.url}/#token={second}")
    expect(fresh.locator("dialog")).not_to_contain_text("Now you are")
    assert fresh.evaluate("sessionStorage.length") == 0
    fresh.locator("dialog").get_by_role("button", name="Sign in").click()
    expect(fresh.locator("#owner")).to_have_text("second")
    assert watched.faults == []
    # A token in the tab that was revoked meanwhile hinders no good address; the browser notes its refusal.
    fresh.evaluate(
        "([found, hash]) => { sessionStorage['isthmus-token'] = found; location.hash = hash; }",
        ["x", f"token={second}"],
    )
    expect(fresh.locator("dialog")).to_contain_text("Sign in as “second”?")
    fresh.locator("dialog").get_by_role("button", name="Sign in").click()
    expect(fresh.locator("#owner")).to_have_text("second")


def test_a_link_signs_in_once(fake: FakeDaemon, watch: Opener) -> None:
    watched = watch(faults=True)
    link = f"{fake.url}/#code={fake.context.sign_in.make()}"
    for page, place in ((watched.page, "#owner"), (watch(faults=True).page, "#token-error")):
        page.goto(link)
        expect(page.locator(place)).to_have_text(re.compile("first|was used already"))
        assert "code" not in page.url
    assert watched.page.evaluate("sessionStorage['isthmus-token']") == fake.token
    assert watched.faults == []


def test_a_daemon_that_goes_away_and_comes_back_is_told(fake: FakeDaemon, watch: Opener) -> None:
    watched = watch(faults=True)
    page = watched.open(fake.token, "crossed")
    expect(page.locator(".drawing text").first).to_be_visible()
    watched.context.set_offline(True)
    expect(page.locator("#banner")).to_contain_text("The daemon does not answer")
    watched.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()


def test_chat_asks_as_a_model_was_tuned_and_the_last_reason_counts(fake: FakeDaemon, watch: Opener) -> None:
    name = _job(fake, 10)
    fake.form = "prompt"
    page = watch().open(fake.token, f"chat/{fake.saved[name][0]['model']}")
    expect(page.locator("#mode")).to_have_value("text")
    for turns, (finish, notes) in enumerate((("stop", 0), ("length", 2)), 1):
        fake.finish = finish
        page.locator("#prompt").fill("Ticket: charged twice")
        page.keyboard.press("Enter")
        expect(page.locator(".turn")).to_have_count(turns)
        expect(page.locator("[aria-busy]")).to_have_count(0)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        expect(page.locator(".note", has_text="cut at the most tokens")).to_have_count(notes)
    assert {body.get("prompt") for body in fake.asked} == {"Ticket: charged twice"}
    fake.form = "messages"
    page.locator("#right").select_option(BASE)
    page.locator("#right").select_option(fake.saved[name][0]["model"])
    expect(page.locator("#mode")).to_have_value("chat")
    # What is chosen stays over another page and back.
    page.locator("#mode").select_option("text")
    for place, heading in (("jobs", "Jobs"), ("chat", "Chat")):
        page.goto(f"{fake.url}/#{place}")
        expect(page.locator("h1")).to_have_text(heading)
    page.locator("#prompt").fill("again")
    page.keyboard.press("Enter")  # it waits for the models' names, and for the form
    expect(page.locator(".turn")).to_have_count(3)
    expect(page.locator("#mode")).to_have_value("text")


def test_a_cloud_that_does_not_answer_is_told_everywhere(fake: FakeDaemon, watch: Opener) -> None:
    name = _job(fake, 5)
    now = time.time()
    fake.jobs[name]["waiting"] = {"cloud": "main", "since": now - 60, "until": now + 540, "reason": "it <b>broke</b>"}
    fake.jobs[name]["seconds_left"] = None
    page = watch().open(fake.token)
    said = re.compile(r"The cloud main has not answered since [^;]*\d\d:\d\d:\d\d; it is waited for until ")
    expect(page.locator(".job .pill[data-status=queued]")).to_have_text("waiting")
    expect(page.locator(".job-time")).to_have_text(said)
    page.goto(f"{fake.url}/#job/{name}")
    expect(page.locator(".notice.bad")).to_have_text(said)
    expect(page.locator(".notice.bad")).to_contain_text("and then the job is queued again (it <b>broke</b>)")
    fake.jobs[name]["waiting"] = None
    expect(page.locator(".notice.bad")).to_be_hidden()
    page.goto(f"{fake.url}/#chat")
    expect(page.locator("#away")).to_be_hidden()
    gone = {"name": "main", "reachable": False, "model": BASE, "error": "no route", "since": now, "until": now + 30}
    fake.context.noted.answers = {"clouds": [gone]}
    expect(page.locator("#away")).to_have_text(said)
    expect(page.locator("#away")).to_contain_text("no route")
    fake.context.noted.answers = {"clouds": [gone | {"reachable": True, "since": None}]}
    expect(page.locator("#away")).to_be_hidden()


def test_what_others_wrote_is_shown_as_text(fake: FakeDaemon, watch: Opener) -> None:
    name = _job(fake, 5, suffix=MARKUP)
    fake.tell(name, MARKUP)
    fake.fail(name, MARKUP)
    watched = watch(faults=True)
    page = watched.open(fake.token)
    expect(page.locator(".job-name")).to_have_text(MARKUP)
    page.goto(f"{fake.url}/#job/{name}")
    expect(page.locator(".event").nth(1)).to_contain_text(MARKUP)
    expect(page.locator(".notice.bad")).to_contain_text(MARKUP)
    page.goto(f"{fake.url}/#job/nothing")
    expect(page.locator(".notice.bad")).to_have_text("there is no job 'nothing'")
    assert page.locator("img").count() == 0
    assert [problem for problem in watched.faults if "404" not in problem] == []  # the browser notes the status


def test_a_page_that_asks_elsewhere_or_runs_inline_scripts_is_noticed(fake: FakeDaemon, watch: Opener) -> None:
    watched = watch(faults=True)
    page = watched.open(fake.token)
    # The policy keeps the page from asking at all …
    page.evaluate(ASK_ELSEWHERE)
    assert any("elsewhere.example/a.png" in violation for violation in watched.violations)
    for script, refused in (("body.innerHTML = 'x'", "HTML"), ("body.setAttribute('onclick', 'told(1)')", "Script")):
        with pytest.raises(Error, match=f"Trusted{refused}"):
            page.evaluate(f"document.{script}")
    # … and a page without one is seen to ask.
    page.route("http://elsewhere.example/*", lambda route: route.abort())
    page.goto("about:blank")
    page.set_content("<img src='http://elsewhere.example/b.png'>")
    assert any("elsewhere.example/b.png" in address for address in watched.elsewhere)
    assert watched.faults != []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_screenshots(fake: FakeDaemon, watch: Opener, tmp_path: Path, width: int, theme: str) -> None:
    folder = Path(os.environ.get("ISTHMUS_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    fake.slow = 0
    watched = watch(viewport={"width": width, "height": 800}, color_scheme=theme)
    _job(fake, 40)
    long = _job(fake, 27, suffix="a-very-long-name-that-goes-on-and-on-until-sixty-four-characters")
    failed = _job(fake, 5, suffix="")
    fake.fail(failed, "the cloud 127.0.0.1:7443 does not answer: start it, or see whether its address is right")
    fake.add_job({"kind": "train", "model": BASE, "suffix": "invoices"})
    private = str(fake.add_job({"kind": "tune", "model": BASE, "suffix": "private"})["id"])
    fake.advance(private, 40)
    fake.jobs[private] |= {"bytes_up": 2_150, "bytes_down": 178_000_000}

    def shoot(name: str) -> None:
        page.evaluate("scrollTo(0, 0)")
        assert page.evaluate("document.documentElement.scrollWidth") == width, f"{name} is wider than its window"
        page.screenshot(path=folder / f"{name}-{width}-{theme}.png", full_page=True, animations="disabled")

    page = watched.page
    page.goto(fake.url)
    page.wait_for_selector("#token")
    shoot("sign-in")
    watched.open(fake.token)
    page.wait_for_selector(".job >> nth=3")
    shoot("jobs")
    for place, name in (("job", long), ("failed", failed), ("private", private)):
        page.goto(f"{fake.url}/#job/{name}")
        page.wait_for_selector(".event")
        shoot(place)
    page.goto(f"{fake.url}/#job/{long}")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("dialog")
    shoot("confirm")
    page.keyboard.press("Escape")
    page.goto(f"{fake.url}/#new")
    page.wait_for_selector("option[value='smollm2-135m']", state="attached")
    page.click("text=Start the job")
    shoot("new")
    page.get_by_label("Mode", exact=True).select_option("emulator")
    page.get_by_text("Package and public texts").click()
    shoot("new-private")
    page.goto(f"{fake.url}/#crossed")
    page.wait_for_selector(".drawing text")
    shoot("crossed")
    page.goto(f"{fake.url}/#chat")
    page.wait_for_selector("option", state="attached")
    page.fill("#prompt", "My card was charged twice. What now?")
    page.get_by_role("button", name="Ask both").click()
    page.wait_for_selector(".said:has-text('tuned')")
    page.wait_for_selector("[aria-busy]", state="detached")
    shoot("chat")
    # The cloud is away.
    now = time.time()
    fake.jobs[long]["waiting"] = {"cloud": "main", "since": now - 60, "until": now + 540, "reason": "it stayed away"}
    fake.jobs[long]["seconds_left"] = None
    gone = {"name": "main", "reachable": False, "model": BASE, "error": "no route", "since": now, "until": now + 540}
    fake.context.noted.answers = {"clouds": [gone]}
    page.wait_for_selector("#away:visible")
    shoot("away-chat")
    page.goto(f"{fake.url}/#job/{long}")
    page.wait_for_selector(".notice.bad")
    shoot("away-job")
    page.goto(f"{fake.url}/#jobs")
    page.wait_for_selector(".pill:has-text('waiting')")
    shoot("away-jobs")
    print(f"screenshots: {folder}")
