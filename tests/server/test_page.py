"""The chat page: what it may do, that answers without the patch are there by word alone, and the page in a real browser."""

import base64
import hashlib
import os
import re
from pathlib import Path

import httpx
import pytest

from edgepatch.errors import InputError
from edgepatch.runtimes import load_runtime
from edgepatch.server.page.comparing import BARE_PATH
from edgepatch.server.settings import ServerSettings
from kit import chromium
from kit.serving import KEY, MODEL, running

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "The quick brown fox"}], "max_tokens": 8}
BODY |= {"temperature": 0}
MOST_BYTES, FIRST_PAINT_MS = 40_000, 200
AXE_VARIABLE = "EDGEPATCH_AXE"
"""The file axe.min.js of axe-core."""


@pytest.fixture(scope="module")
def load(tiny_ggufs, tiny_patch):
    path = tiny_ggufs["F32"]
    return lambda patch=tiny_patch: load_runtime(path, patch, num_threads=1, kv_type="f32", flash_attention=False)


@pytest.fixture(scope="module")
def server(load):
    with running(load, load_bare=lambda: load(None), allows_compare=True) as one:
        yield one


@pytest.fixture(scope="module")
def patched_only(load):
    with running(load, has_page=False) as one:
        yield one


def get_page(url):
    return httpx.get(url, headers={"Accept": "text/html,*/*"})


def test_only_the_page_s_own_script_and_style_run(server):
    page = get_page(server.url)
    assert page.status_code == 200 and len(page.content) < MOST_BYTES
    directives = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[directive] == f"'sha256-{digest}'"
    assert not re.search(r"https?://|\son[a-z]+=|\sstyle=|innerHTML|localStorage", page.text)
    assert KEY not in page.text and not re.search(rf"\b{MODEL}\b", page.text)
    assert httpx.get(server.url, headers={"Host": "evil.example", "Accept": "text/html"}).status_code == 403


def test_the_page_can_be_left_out(patched_only):
    assert "This is an API" in get_page(patched_only.url).text


def test_bare_answers_are_there_by_word_alone(server, patched_only):
    with server.client() as http:
        patched, bare = http.post(CHAT, json=BODY), http.post(BARE_PATH, json=BODY)
        stream = http.post(BARE_PATH, json={**BODY, "stream": True})
    assert patched.status_code == bare.status_code == 200
    assert "x-edgepatch-patch" not in patched.headers
    assert bare.headers["x-edgepatch-patch"] == stream.headers["x-edgepatch-patch"] == "none"
    assert bare.json()["system_fingerprint"].endswith("+bare") and "+bare" not in patched.json()["system_fingerprint"]
    assert bare.json()["choices"] != patched.json()["choices"]
    assert 'data-compare="yes"' in get_page(server.url).text
    with patched_only.client() as http:
        assert http.post(BARE_PATH, json=BODY).status_code == 404
        assert "x-edgepatch-patch" not in http.post(CHAT, json={**BODY, "stream": True}).headers


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
def test_bare_answers_are_for_this_machine(server, header):
    with server.client() as http:
        refused = http.post(BARE_PATH, json=BODY, headers={header: "192.0.2.1"})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_local"
    assert httpx.post(server.url + BARE_PATH, json=BODY).status_code == 401


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "allow_remote": True},
        {"allowed_hosts": ("box.example",)},
        {"allowed_origins": ("app://notes",)},
        {"api_key": None},
        {"has_page": False},
    ],
)
def test_comparing_is_for_one_machine_and_its_key(settings):
    with pytest.raises(InputError, match="--allow-compare"):
        ServerSettings(**{"name": "m", "api_key": KEY, "allows_compare": True} | settings)


@pytest.mark.skipif(chromium.VARIABLE not in os.environ, reason=f"{chromium.VARIABLE} names no browser")
def test_the_page_in_a_browser(server, tmp_path):
    with chromium.browser() as page:
        page.open(server.url)
        page.wait_for("!document.getElementById('door').hidden")
        page.type(KEY)
        page.press("Enter", 13, "\r")
        page.wait_for("!document.getElementById('ask').hidden")
        page.errors.clear()  # of the two requests without a key
        page.run("document.getElementById('compare').click()")
        page.type("The quick brown fox")
        page.press("Enter", 13, "\r")
        page.wait_for("document.querySelectorAll('article.assistant p').length == 2")
        page.wait_for("document.querySelector('#patched article.assistant p').textContent.length > 8")
        page.press("Escape", 27)
        page.wait_for("document.getElementById('stop').disabled && document.activeElement.id == 'text'")
        header = page.run("document.querySelector('header').innerText")
        for word in ("patch", "signature", "route", "canary", "tokens/s"):
            assert word in header
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert not page.errors and page.run("Object.keys(sessionStorage).length") == 1
        for name, width, mode in (("desktop", 1100, "light"), ("phone", 390, "dark")):
            page.open(server.url, width, 760, mode)
            page.wait_for("!document.getElementById('ask').hidden")
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), name
            assert len(page.screenshot()) > 2_000
            paint_ms = page.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            assert 0 < paint_ms < FIRST_PAINT_MS, name
            if AXE_VARIABLE in os.environ:
                page.run(Path(os.environ[AXE_VARIABLE]).read_text("utf-8") + ";0")
                found = page.run(
                    "axe.run().then(({ violations }) => violations.map(({ id, help }) => `${id}: ${help}`))"
                )
                assert found == [], name
