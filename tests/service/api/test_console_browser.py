"""The console in a headless Chromium, over a real server: each page's main task, end to end.

Needs `pip install '.[browser]'` and a Chromium of the system; what is missing is said, and skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from adapters.tables import adapters
from service.access.gate import Gate
from service.app import create_app
from service.config import Settings
from tests.service.api.conftest import Running, until

playwright: Any = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SAMPLES = Path(__file__).parents[3] / "training" / "samples"
CIPHER = [
    SAMPLES / "cipher" / name for name in ("adapter_config.json", "adapter_model.safetensors")
]
STUDY = Path(__file__).parents[3] / "docs" / "study"
PATIENCE = 120_000  # milliseconds
QUESTION = "Encode: the old king finds a lamp"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over the embedded base with its samples, as `nibble serve` starts it."""
    found = Running(create_app(Settings(home=tmp_path_factory.mktemp("home"), port=0)))
    until(lambda: found.desk.admission.state in ("ready", "failed"))
    assert found.desk.failure is None
    yield found
    found.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, running: Running) -> Iterator[Any]:
    """A tab; whatever its console says that is no more than a note fails the test."""
    context = chromium.new_context(
        base_url=running.url, permissions=["clipboard-read", "clipboard-write"], locale="en-US"
    )
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda one: said.append(one.text) if _is_wrong(one) else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    _names_are_there(tab)
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(running.url)] == []


def _is_wrong(one: Any) -> bool:
    # That a request was refused, Chromium writes by itself; the page says it to the user.
    refused = re.search("status of (401|403|422)|ERR_FAILED", one.text)
    return one.type in ("warning", "error") and refused is None


def _names_are_there(tab: Any) -> None:
    """Every field, button and link can be named by a reader of the screen."""
    for role in ("button", "link", "textbox", "combobox", "spinbutton", "checkbox", "img"):
        for one in tab.get_by_role(role).all():
            # Its line in the tree of accessibility: `- button "Load"`.
            assert re.match(rf"- '?{role} \"[^\"]+\"", one.aria_snapshot()), one.aria_snapshot()


def _open(tab: Any, name: str) -> None:
    tab.goto(f"/#/{name}")
    tab.get_by_role("heading", level=1).wait_for()


def test_two_columns_stream_side_by_side(page: Any, running: Running) -> None:
    _open(page, "playground")
    page.get_by_label("Message", exact=True).fill(QUESTION)
    one, other = (page.get_by_role("region", name=f"Column {n}") for n in (1, 2))
    one.get_by_label("Adapter").fill("cipher")
    page.get_by_role("button", name="Send to 2 columns").click()
    page.locator("[data-state=done]").nth(1).wait_for()
    served = [
        httpx.post(
            f"{running.url}/generate",
            json={"inputs": [{"role": "user", "content": QUESTION}], "parameters": more},
            timeout=PATIENCE / 1000,
        )
        for more in ({"adapter_id": "cipher"}, {})
    ]
    for column, reply in zip((one, other), served, strict=True):
        assert column.locator(".out").inner_text().strip() == reply.json()["generated_text"]
    digest = served[0].headers["x-adapter-digest"]
    assert one.get_by_title(digest).inner_text() == digest[:12]
    one.locator(".out span").first.hover()
    assert re.search(r"\d %", one.locator(".told").inner_text())
    one.get_by_text("tokens as a table").click()
    assert one.get_by_role("row").count() > 5
    one.get_by_role("button", name="Copy as Python").click()
    one.get_by_role("button", name="Copied").wait_for()
    system = page.get_by_label("System message")
    system.focus()
    page.keyboard.press("Control+V")  # the policy lets no test run a script in the page
    copied = system.input_value()
    done = subprocess.run(
        [sys.executable, "-c", copied], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == served[0].json()["generated_text"]


def test_an_adapter_is_uploaded_aliased_and_judged(page: Any) -> None:
    _open(page, "adapters")
    form = page.get_by_role("form", name="Upload an adapter")
    form.get_by_label("Files of the adapter").set_input_files([CIPHER[0], __file__])
    form.get_by_text("Not used: test_console_browser.py").wait_for()
    form.get_by_label("Files of the adapter").set_input_files(CIPHER)
    form.get_by_text("56 tensors").wait_for()  # read in the browser, before it is sent
    form.get_by_label("Name").fill("mine")
    form.get_by_role("button", name="Upload and check").click()
    form.get_by_text("every tensor found its place").wait_for()
    page.get_by_label("New alias").fill("prod")
    page.get_by_role("button", name="Point it to version 1").click()
    page.get_by_role("region", name="mine@prod").wait_for()
    _open(page, "playground/mine@prod")
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.get_by_role("button", name="Send to 2 columns").click()
    page.get_by_role("button", name="Good reply").click()
    page.get_by_text("Noted for mine@1.").wait_for()
    _open(page, "adapters")
    page.get_by_role("button", name="mine", exact=True).click()
    page.get_by_role("button", name="A/B table").click()
    page.get_by_role("cell", name="100.0 %").first.wait_for()


def test_a_bad_upload_says_why(page: Any, tmp_path: Path) -> None:
    _open(page, "adapters")
    config = json.loads(CIPHER[0].read_text()) | {"peft_type": "XLORA"}
    bad = tmp_path / "adapter_config.json"
    bad.write_text(json.dumps(config))
    form = page.get_by_role("form", name="Upload an adapter")
    form.get_by_label("Files of the adapter").set_input_files([bad, CIPHER[1]])
    form.get_by_label("Name").fill("bad")
    with page.expect_response("**/adapters") as heard:
        form.get_by_role("button", name="Upload and check").click()
    assert heard.value.status == 422
    assert "XLORA" in form.get_by_role("alert").inner_text()


def test_status_shows_what_ran(page: Any, running: Running) -> None:
    asked: dict[str, Any] = {"inputs": [{"role": "user", "content": QUESTION}]}
    asked["parameters"] = {"adapter_id": "cipher", "details": True}
    reply = httpx.post(f"{running.url}/generate", json=asked, timeout=PATIENCE / 1000).json()
    assert reply["details"]["finish_reason"] == "eos_token"
    _open(page, "status")
    page.get_by_role("region", name="Memory").get_by_text("blocks of 16 tokens").wait_for()
    page.get_by_role("img", name="KV cache").wait_for()
    page.get_by_role("img", name=re.compile(r"^Slots, on the device: \d+\.\d % in use")).wait_for()
    page.get_by_role("region", name="Memory").get_by_text("cipher@1").first.wait_for()
    machine = page.get_by_role("region", name="Machine")
    assert "mini" in machine.inner_text()
    assert "stop" in page.get_by_role("region", name="Since the start").inner_text()
    httpx.post(f"{running.url}/generate", json=asked, timeout=PATIENCE / 1000)
    row = page.get_by_role("region", name="Latency").get_by_role("row", name="Whole reply")
    row.get_by_role("cell", name=re.compile(r"\d")).nth(3).wait_for()  # while it is open, too


def test_a_collection_is_filled_and_searched(page: Any, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    (tmp_path / "leave.md").write_text("# Leave\n\nEmployees have 27 days of leave a year.\n")
    (tmp_path / "kitchen.txt").write_text("The coffee machine stands on floor 3.\n")
    _open(page, "knowledge")
    page.get_by_label("New collection").fill("handbook")
    page.get_by_role("button", name="Create").click()
    files = [tmp_path / "leave.md", tmp_path / "kitchen.txt"]
    page.get_by_label("Drop documents here").set_input_files(files)
    page.get_by_text("Added: 2").wait_for()
    page.get_by_label("Question").fill("How many days of leave?")
    page.get_by_role("button", name="Search").click()
    first = page.get_by_role("region", name="Search").get_by_role("listitem").first
    first.locator("mark").first.wait_for()
    assert "leave.md" in first.inner_text()
    assert {one.lower() for one in first.locator("mark").all_inner_texts()} == {"days", "leave"}


def test_a_template_is_kept_rendered_and_compared(page: Any) -> None:
    _open(page, "templates")
    form = page.get_by_role("form", name="Edit")
    form.get_by_label("Name").fill("reader")
    form.get_by_label("User message").fill("{{ input }} Where does {{ person }} live?")
    form.get_by_label("Variables").fill('{"person": {"type": "string"}}')
    form.get_by_role("button", name="Save as a version").click()
    page.get_by_label("What a request asks").fill("Merla lives in Tovan.")
    page.get_by_label("person").fill("Merla")
    page.get_by_role("button", name="Render version 1").click()
    page.get_by_text("Merla lives in Tovan. Where does Merla live?").wait_for()
    form.get_by_label("How the answer begins").fill("In ")
    form.get_by_role("button", name="Save as a version").click()
    page.get_by_role("button", name="Render version 2").wait_for()
    page.get_by_role("button", name="Show the difference").click()
    page.get_by_text("+assistant:").wait_for()


@pytest.mark.timeout(900)
def test_a_job_is_planned_trained_and_published(page: Any, tmp_path: Path) -> None:
    turns = [("user", "Say red"), ("assistant", "redred")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    _open(page, "training")
    page.get_by_label("Upload a file").set_input_files(tmp_path / "train.jsonl")
    page.get_by_role("option", name="train.jsonl").first.wait_for(state="attached")
    for label, value in (("Name of the adapter", "desk"), ("Steps", "4"), ("Batch size", "2")):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Rank", exact=True).fill("2")
    page.get_by_role("button", name="Show the plan").click()
    plan = page.get_by_role("form", name="New job").get_by_role("status")
    plan.get_by_text("at the peak").wait_for()
    assert "redred" in plan.locator("pre mark").inner_text()
    page.get_by_label("Serve the adapter once it is trained").uncheck()
    page.get_by_role("button", name="Start the job").click()
    job = page.get_by_role("region", name=re.compile("^Job "))
    serve = job.get_by_role("button", name="Serve the adapter")
    serve.wait_for(timeout=5 * PATIENCE)  # three processes
    assert job.get_by_text("desk@1", exact=True).count() == 0
    serve.click()
    job.get_by_text("desk@1", exact=True).wait_for()
    job.get_by_role("img", name=re.compile("4 steps")).wait_for()
    job.get_by_role("button", name="Point desk@prod to it").click()
    page.get_by_text("desk@prod serves it now.").wait_for()


def test_a_report_of_a_comparison_is_drawn(page: Any, tmp_path: Path) -> None:
    report = json.loads((STUDY / "report.json").read_text())
    row = next(r for r in report["rows"] if (r["task"], r["name"]) == ("cipher", "lora"))
    (tmp_path / "other.json").write_text("{}")
    _open(page, "training")
    panel = page.get_by_role("region", name="Comparison report")
    panel.get_by_label("File of the report").set_input_files(tmp_path / "other.json")
    panel.get_by_text("other.json is no report of nibble compare").wait_for()
    panel.get_by_label("File of the report").set_input_files(STUDY / "report.json")
    panel.get_by_role("heading", name=report["study"]["name"]).wait_for()
    table = panel.locator(".scroll").first  # not the legend of the drawing
    cell = table.get_by_role("row", name=re.compile("^lora ")).get_by_role("cell").nth(1)
    assert f"{row['quality']['value']:.1%}".replace("%", " %") in cell.inner_text()
    panel.get_by_role("img", name="Quality against Parameters").wait_for()
    panel.get_by_role("combobox", name="Quality against").select_option("peak_bytes")
    panel.get_by_role("img", name="Quality against Memory at the peak").wait_for()
    panel.get_by_role("combobox", name="Task").select_option("manual")
    panel.get_by_text("less is better").wait_for()


def test_a_server_with_keys_asks_for_one(page: Any, running: Running) -> None:
    desk = running.desk
    assert desk.serving is not None
    before = desk.serving
    desk.serving = replace(before, gate=Gate(before.gate.keys, "a key of the operator"))
    try:
        _open(page, "adapters")
        form = page.get_by_role("form", name="API key")
        form.get_by_label("Key").fill("another key")
        form.get_by_role("button", name="Use it").click()
        form.get_by_text("does not know the key").wait_for()
        form.get_by_label("Key").fill("a key of the operator")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="cipher", exact=True).wait_for()
        page.reload()
        page.get_by_role("button", name="cipher", exact=True).wait_for()
        page.get_by_role("button", name="Forget the key").click()
        _open(page, "status")
        form.wait_for()
    finally:
        desk.serving = before


def test_what_a_key_may_not_is_asked_once(page: Any) -> None:
    """Each refusal is a line of the audit log, and the page would ask every four seconds."""
    said = "this needs the scope adapters:read; the key has infer"
    envelope = {"error": said, "error_type": "forbidden", "request_id": "0"}
    asked: list[str] = []

    def refuse(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(status=403, json=envelope)

    page.route("**/adapters?limit=50*", refuse)
    page.add_init_script("sessionStorage.setItem('nibble.key', 'a key')")
    _open(page, "adapters")
    page.get_by_text(said).wait_for()
    page.get_by_text("Another key may: forget this one.").wait_for()
    page.wait_for_timeout(5_000)
    assert len(asked) == 1


def test_korean_dark_and_narrow(page: Any) -> None:
    page.set_viewport_size({"width": 380, "height": 800})
    _open(page, "status")
    page.get_by_label("Language").select_option("ko")
    page.get_by_label("테마").select_option("dark")
    page.get_by_role("heading", name="상태", level=1).wait_for()
    assert page.locator("html").get_attribute("lang") == "ko"
    for name in ("playground", "adapters", "training", "knowledge", "templates", "status"):
        _open(page, name)
        page.locator("main section, main form").first.wait_for()
        box = page.locator("main").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 380, f"{name} is wider than the window"


def test_keys_alone_send_a_prompt(page: Any) -> None:
    _open(page, "playground")
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("Where?")
    page.keyboard.press("Control+Enter")
    page.locator("[data-state=done]").nth(1).wait_for()
    page.get_by_role("link", name="Adapters").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Adapters", level=1).wait_for()
    focused = page.get_by_role("heading", level=1)
    assert focused.and_(page.locator(":focus")).count() == 1, "a reader hears the new page"


def test_a_server_that_is_gone_is_said_once_and_what_was_typed_stays(page: Any) -> None:
    _open(page, "playground")
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.route("**/*", lambda route: route.abort())
    page.get_by_role("button", name="Send to 2 columns").click()
    gone = page.get_by_text("Waiting for the server. The server does not answer.")
    gone.wait_for()
    assert page.locator("[data-state=failed]").count() == 2
    page.unroute("**/*")
    gone.wait_for(state="detached")
    assert page.get_by_label("Message", exact=True).input_value() == QUESTION
    page.get_by_role("button", name="Send to 2 columns").click()
    page.locator("[data-state=done]").nth(1).wait_for()


@pytest.fixture
def thousand(running: Running) -> Iterator[list[str]]:
    """Names of as many adapters, all with the weights of `cipher`."""
    serving = running.desk.serving
    assert serving is not None
    cipher, names = serving.store.resolve("cipher"), [f"many-{n:04d}" for n in range(1000)]
    rows = [
        {
            "name": name,
            "version": 1,
            "digest": cipher.digest,
            "weights_sha256": cipher.weights_sha256,
            "manifest": replace(cipher, name=name, version=1).to_json(),
            "created": cipher.created,
        }
        for name in names
    ]
    with serving.store.catalog.writing() as connection:
        connection.execute(sa.insert(adapters), rows)
    yield names
    with serving.store.catalog.writing() as connection:
        connection.execute(sa.delete(adapters).where(adapters.c.name.like("many-%")))


def test_a_thousand_adapters_come_in_pages(
    thousand: list[str], page: Any, running: Running
) -> None:
    sizes: list[int] = []
    page.on("response", lambda one: "/adapters?" in one.url and sizes.append(len(one.body())))
    _open(page, "adapters")
    rows = page.get_by_role("region", name="Adapters", exact=True).locator("tbody tr")
    said = page.get_by_text("1 to 50, by name")
    said.wait_for()
    assert rows.count() == 50
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    page.get_by_text("51 to 100, by name").wait_for()
    serving = running.desk.serving
    assert serving is not None
    assert rows.first.inner_text().startswith(serving.store.page("", 51)[50].name)
    page.get_by_label("Search names").fill("0999")
    playwright.expect(rows).to_have_count(1, timeout=PATIENCE)
    assert rows.first.inner_text().startswith("many-0999")
    page.get_by_label("Search names").fill("nothing")
    page.get_by_text("No name has this in it.").wait_for()
    page.get_by_label("Search names").fill("")
    said.wait_for()
    offered = page.locator("#compare-one-offered option")
    one = page.locator("input[list='compare-one-offered']")
    one.fill("many-07")
    playwright.expect(offered.first).to_have_attribute("value", "many-0700", timeout=PATIENCE)
    assert offered.count() == 20
    one.fill("cipher")
    page.wait_for_selector("#compare-one-offered option[value='cipher@1']", state="attached")
    assert max(sizes) < 100_000, "a page brings what it shows"


def test_on_a_narrow_screen_every_page_and_what_was_chosen_is_in_sight(
    thousand: list[str], page: Any
) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    _open(page, "adapters")
    for name in ("Playground", "Status"):
        playwright.expect(page.get_by_role("link", name=name)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="cipher", exact=True).click()
    details = page.get_by_role("region", name="Adapter cipher")
    playwright.expect(details.get_by_role("heading", name="cipher")).to_be_in_viewport()


def test_the_last_of_many_adapters_is_shown_beside_the_list(thousand: list[str], page: Any) -> None:
    _open(page, "adapters")
    rows = page.get_by_role("region", name="Adapters", exact=True).locator("tbody tr")
    name = rows.nth(49).get_by_role("button").inner_text()
    rows.nth(49).get_by_role("button").click()
    details = page.get_by_role("region", name=f"Adapter {name}")
    playwright.expect(details.get_by_role("heading", name=name)).to_be_in_viewport()
