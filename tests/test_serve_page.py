"""The search page of `amp serve` in headless Chromium."""

import json
import time
from http.client import HTTPConnection
from urllib.parse import quote, urlsplit

import pytest
from support.browser import DOWN, ENTER, ESCAPE, LEFT, RIGHT, chromium, press
from support.drawn_data import draw
from support.serving import KNOWLEDGE, QUERY, make_app, make_service, served

pytest.importorskip("fastapi")
pytestmark = pytest.mark.system

EVIL = "<img src=x onerror=\"document.title='broken in'\">"
NONE = {"triplets": [], "states": []}


@pytest.fixture(scope="module")
def folder(clip_folder, tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(clip_folder, folder):
    """Address of a server with a photo whose name is markup."""
    service = make_service(clip_folder, folder)
    draw(30).save(folder / "photos" / f"{EVIL}.png")
    service.retriever.update(folder / "photos", workers=0, states=None)
    with served(make_app(service)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def run(browser, script, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


def until(browser, script, expected=True):
    for _ in range(150):
        found = run(browser, script)
        if found == expected:
            return
        time.sleep(0.1)
    raise AssertionError(f"{script}: {found}, expected {expected}")


ANSWERS = "Number(document.body.dataset.answers ?? 0)"


class searched:
    """Waits until the page shows the answer to what happens inside the block."""

    def __init__(self, browser):
        self.browser = browser

    def __enter__(self):
        self.before = run(self.browser, ANSWERS)

    def __exit__(self, kind, *_):
        if kind is None:
            until(self.browser, f"{ANSWERS} > {self.before}")


def opened(browser, address):
    browser.get("about:blank")
    browser.get(address)
    until(browser, f"{ANSWERS} > 0")


@pytest.fixture
def page(browser, server):
    """The page with the results of a query."""
    opened(browser, f"{server}#q={quote(QUERY)}")
    yield browser
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == [], severe


def ask(server, **body):
    connection = HTTPConnection(urlsplit(server).netloc)
    connection.request("POST", "/v1/search", json.dumps({"count": 20, **body}), {"Content-Type": "application/json"})
    return json.load(connection.getresponse())


def order(browser, column):
    return run(browser, f"[...document.querySelectorAll('#{column} .hit')].map(h => Number(h.dataset.photo))")


def badges(browser):
    return run(browser, "[...document.querySelectorAll('#ours .badge')].map(b => b.textContent)")


def shows(browser, found):
    """Whether the page shows an answer."""
    base = sorted(found["hits"], key=lambda hit: hit["base_rank"])
    moves = [hit["base_rank"] - hit["rank"] for hit in found["hits"]]
    expected = ["=" if move == 0 else f"▲ {move}" if move > 0 else f"▼ {-move}" for move in moves]
    assert order(browser, "ours") == [hit["photo"] for hit in found["hits"]]
    assert order(browser, "base") == [hit["photo"] for hit in base]
    assert badges(browser) == expected
    return expected


def click(browser, selector, number=0):
    run(browser, f"document.querySelectorAll('{selector}')[{number}].click()")


def test_a_typed_query_shows_both_orders_and_what_moved(browser, server):
    opened(browser, server)
    assert run(browser, "document.activeElement.id") == "query"
    assert "15 photos · tiny" in run(browser, "document.querySelector('header').innerText")
    with searched(browser):
        press(browser, QUERY + ENTER)
    moved = shows(browser, ask(server, query=QUERY))
    assert len(moved) == 15 and sum(move != "=" for move in moved) >= 2
    summary = run(browser, "document.getElementById('summary').textContent")
    assert f"{sum(move != '=' for move in moved)} of 15 photos moved." in summary
    assert "not re-ranked" in run(browser, "document.getElementById('ours').innerText")  # after the sixth photo
    assert run(browser, "[...document.querySelectorAll('#triplets input[type=text]')].map(x => x.value)") == [
        *("dog", "chases", "ball"),
        *("dog", "is", "red"),
    ]


def test_names_and_queries_are_no_markup(page, server):
    with searched(page):
        run(page, "document.getElementById('query').select()")
        press(page, EVIL + ENTER)
    names = run(page, "[...document.querySelectorAll('#ours img')].map(x => x.alt)")
    assert f"{EVIL}.png" in names
    photo = run(page, "document.querySelector(`#ours img[alt*='onerror']`).closest('.hit').dataset.photo")
    run(page, f"document.querySelector('#ours .hit[data-photo=\"{photo}\"]').click()")
    until(page, "document.getElementById('name').textContent", f"{EVIL}.png")
    assert run(page, "document.querySelectorAll('img[src=x]').length") == 0
    assert page.title.startswith("<img src=x")  # the query, as text


def test_the_page_contacts_only_its_server(page, server):
    until(page, "performance.getEntriesByType('resource').length > 15")
    names = run(page, "performance.getEntriesByType('resource').map(x => x.name)")
    assert all(name.startswith((server, "data:")) for name in names)
    blocked = page.execute_async_script(
        "const done = arguments[0]; fetch('http://localhost:9/').catch(error => done(String(error)))"
    )
    assert "Failed to fetch" in blocked
    page.get_log("browser")  # drops the report of the blocked request


def test_switching_off_and_editing_change_the_order(page, server):
    before = order(page, "ours")
    with searched(page):
        click(page, ".switch:not(.small)", 1)
    first = {"triplets": KNOWLEDGE.to_dict()["triplets"][:1], "states": [KNOWLEDGE.states[0]]}
    shows(page, ask(server, query=QUERY, knowledge=first))
    assert run(page, "document.querySelectorAll('.triplet.off').length") == 1
    with searched(page):
        click(page, ".switch.small", 0)
    shows(page, ask(server, query=QUERY, knowledge={**first, "states": [""]}))
    with searched(page):
        click(page, ".switch:not(.small)", 0)
    shows(page, ask(server, query=QUERY, knowledge=NONE))
    with searched(page):
        click(page, "#reset")
    assert order(page, "ours") == before and run(page, "document.getElementById('reset').hidden")
    field = "document.querySelector('#triplets input[aria-label=action]')"
    run(page, f"{field}.select()")
    with searched(page):
        press(page, "carries")  # without Enter, after a pause
    edited = {**KNOWLEDGE.to_dict()}
    edited["triplets"] = [{**edited["triplets"][0], "action": "carries"}, edited["triplets"][1]]
    shows(page, ask(server, query=QUERY, knowledge=edited))
    assert run(page, f"document.activeElement === {field}")
    with searched(page):
        run(page, "document.querySelector('#triplets textarea').select()")
        press(page, "The dog holds the ball" + ENTER)
    edited["states"] = ["The dog holds the ball", edited["states"][1]]
    shows(page, ask(server, query=QUERY, knowledge=edited))


def test_a_triplet_can_be_added(page, server):
    click(page, "#add")
    assert "needs at least who and does" in run(page, "document.getElementById('triplets').innerText")
    press(page, "girl\tholds\tkite\t\t")
    with searched(page):
        press(page, "The girl lifts one arm" + ENTER)
    known = KNOWLEDGE.to_dict()
    added = {"subject": "girl", "action": "holds", "object": "kite", "kind": "action"}
    knowledge = {"triplets": [*known["triplets"], added], "states": [*known["states"], "The girl lifts one arm"]}
    shows(page, ask(server, query=QUERY, knowledge=knowledge))
    click(page, "#add")
    run(page, "document.querySelector('#triplets .triplet:last-child input[type=text]').focus()")
    with searched(page):
        press(page, "a\tb" + ENTER)
    notes = run(page, "[...document.querySelectorAll('.triplet .note')].map(x => x.textContent)")
    assert notes == ["", "not read: the model reads 3 triplets", "", ""]  # an attribute, after the actions


def test_the_address_can_be_shared(page, server):
    with searched(page):
        click(page, ".switch:not(.small)", 1)
    with searched(page):
        run(page, "document.getElementById('top').value = 10")
        run(page, "document.getElementById('top').dispatchEvent(new Event('change'))")
    expected, address = order(page, "ours"), page.current_url
    opened(page, address)
    assert order(page, "ours") == expected
    assert run(page, "document.querySelectorAll('.triplet.off').length") == 1
    assert run(page, "document.getElementById('top').value") == "10"
    assert run(page, "document.getElementById('query').value") == QUERY
    known = {"triplets": KNOWLEDGE.to_dict()["triplets"][:1], "states": [KNOWLEDGE.states[0]]}
    shows(page, ask(server, query=QUERY, top_k=10, knowledge=known))
    with searched(page):
        run(page, "document.getElementById('query').select()")
        press(page, "A girl" + ENTER)  # another query has its own knowledge
    assert run(page, "document.querySelectorAll('.triplet.off').length") == 0
    with searched(page):
        page.back()
    assert run(page, "document.getElementById('query').value") == QUERY and order(page, "ours") == expected


@pytest.mark.parametrize(
    "address", ["#q=dog&k=[[", "#q=dog&k=7", "#q=dog&top=many&weight=x&photo=1e9", "#k=[]&like=", "#%"]
)
def test_addresses_that_were_changed_by_hand(browser, server, address):
    opened(browser, server + address)
    assert run(browser, "document.getElementById('error').hidden")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_keyboard_reaches_everything(page, server):
    run(page, "document.activeElement.blur()")
    press(page, "/")
    assert run(page, "document.activeElement.id") == "query"
    press(page, ESCAPE)
    press(page, DOWN)
    focused = "document.activeElement.closest('.hits')?.id + document.activeElement.dataset.photo"
    ours, base = order(page, "ours"), order(page, "base")
    assert run(page, focused) == f"ours{ours[0]}"
    press(page, RIGHT)
    assert run(page, focused) == f"ours{ours[1]}"
    assert run(page, "[...document.querySelectorAll('.twin')].map(x => Number(x.dataset.photo))") == [ours[1]] * 2
    press(page, LEFT + LEFT)
    assert run(page, focused).startswith("base")
    press(page, RIGHT + DOWN)
    assert run(page, focused).startswith("ours") and run(page, focused) != f"ours{ours[0]}"
    press(page, ENTER)
    photo = int(run(page, "document.activeElement.dataset.photo ?? location.hash.match(/photo=(\\d+)/)[1]"))
    until(page, "document.querySelectorAll('#maps canvas[data-drawn=map]').length", 4)  # 2 triplets, 2 states
    assert f"photo={photo}" in page.current_url and run(page, "document.getElementById('dialog').open")
    assert run(page, "document.getElementById('large').dataset.drawn") == "photo"
    press(page, "1")
    assert run(page, "document.getElementById('large').dataset.drawn") == "map"
    colours = "new Set(document.getElementById('large').getContext('2d').getImageData(0, 0, 448, 448).data).size"
    assert run(page, colours) > 50
    press(page, "1")
    assert run(page, "document.getElementById('large').dataset.drawn") == "photo"
    following = ours[ours.index(photo) + 1]
    press(page, RIGHT)
    until(page, f"location.hash.includes('photo={following}')")
    press(page, ESCAPE)
    assert not run(page, "document.getElementById('dialog').open")
    until(page, "location.hash.includes('photo=')", False)
    assert base  # both orders are there
    opened(page, f"{server}#q={quote(QUERY)}&photo={photo}")  # a shared photo opens
    until(page, "document.getElementById('dialog').open")


def test_a_photo_as_the_query(page, server, folder):
    opened(page, server)
    upload = folder / "upload.png"
    draw(40).resize((2000, 1400)).save(upload)
    page.find_element("id", "file").send_keys(str(upload))
    until(page, f"{ANSWERS} > 1")
    assert run(page, "document.getElementById('like').hidden") is False
    found = ask(server, image=run(page, "upload"))
    assert order(page, "base") == [hit["photo"] for hit in found["hits"]]
    assert run(page, "document.querySelector('[data-column=ours]').hidden")
    assert run(page, "document.getElementById('like-image').naturalWidth") == 1024  # sent smaller than it is
    with searched(page):
        run(page, "document.getElementById('query').focus()")
        press(page, QUERY + ENTER)
    shows(page, ask(server, image=run(page, "upload"), query=QUERY))
    with searched(page):
        click(page, "#unlike")
    shows(page, ask(server, query=QUERY))


def test_photos_like_one_of_the_index(page, server):
    name = run(page, "document.querySelector('#ours img').alt")
    click(page, "#ours .hit")
    until(page, "document.getElementById('dialog').open")
    with searched(page):
        click(page, "#similar")
    assert order(page, "base") == [hit["photo"] for hit in ask(server, image=name)["hits"]]
    address, expected = page.current_url, order(page, "base")
    assert "like=" in address
    opened(page, address)
    assert order(page, "base") == expected
    until(page, "document.getElementById('like-image').naturalWidth > 0")


def test_a_phone(page, server):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        opened(page, f"{server}#q={quote(QUERY)}")
        assert run(page, "document.documentElement.scrollWidth") <= 390
        columns = "[...document.querySelectorAll('.column')].map(x => x.offsetParent !== null)"
        assert run(page, columns) == [False, True]
        click(page, "#tabs button", 0)
        assert run(page, columns) == [True, False]
        small = run(
            page,
            "[...document.querySelectorAll('#bar button:not([hidden]), #tabs button, .hit')]"
            ".filter(visible).map(x => x.getBoundingClientRect()).filter(r => r.width < 32 || r.height < 32).length",
        )
        assert small == 0
        click(page, "#base .hit")
        until(page, "document.querySelectorAll('#maps canvas[data-drawn=map]').length", 4)
        assert run(page, "document.getElementById('dialog').getBoundingClientRect().right") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_light_and_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = run(page, ground)
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = run(page, ground)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    run(page, "document.activeElement.blur()")
    press(page, "t")
    assert run(page, ground) == dark != light


def test_errors_are_shown(page):
    with searched(page):
        run(page, "document.getElementById('query').value = 'a'.repeat(2001)")
        click(page, "#bar .first")
    assert "query is 'aaa" in run(page, "document.getElementById('error').innerText")
    page.get_log("browser")  # drops the report of status 400


def test_a_server_that_is_gone(clip_folder, browser, tmp_path):
    with served(make_app(make_service(clip_folder, tmp_path))) as port:
        opened(browser, f"http://127.0.0.1:{port}/#q={quote(QUERY)}")
    with searched(browser):
        click(browser, "#bar .first")
    assert run(browser, "document.getElementById('error').innerText").startswith("The server can't be reached.")
    browser.get_log("browser")
