"""The page over HTTP, without a browser and without its script."""

import re

import pytest
from starlette.testclient import TestClient

from qlora_lab.annotation.store import Store
from qlora_lab.annotation.web import create_app
from qlora_lab.ratings.answers import Answer
from tests.annotation.helpers import made_up, new_study
from tests.small_disk import fill, small_disk

HOSTILE = "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)> [x](javascript:alert(1))"


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def client_of(store: Store, clock: Clock | None = None) -> tuple[TestClient, list[str]]:
    client = TestClient(create_app(store, clock or Clock()), raise_server_exceptions=False)
    return client, [f"/a/{annotator.token}" for annotator in store.annotators()]


def fields(html: str, form: str) -> dict[str, str]:
    """Return the hidden fields of a form, as a browser without script would send them."""
    part = html.split(f'<form class="{form}"')[1].split("</form>")[0]
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', part))


def choose(client: TestClient, link: str, **changed: str):
    form = {**fields(client.get(link).text, "vote"), "verdict": "first"}
    return client.post(f"{link}/vote", data={**form, **changed})


def test_a_study_can_be_judged_with_plain_forms(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann", "bo", questions=3)
    client, (ann, bo) = client_of(store)
    for judged in range(3):
        page = client.get(ann).text
        assert f"<b>{judged}</b> of 3 judged" in page
        assert "Answer 1" in page and "Answer 2" in page and "What is" in page
        assert choose(client, ann, verdict=("first", "second", "tie")[judged]).status_code == 200
    assert "All 3 judged" in client.get(ann).text
    assert "<b>0</b> of 3 judged" in client.get(bo).text
    assert [vote.judgment.verdict for vote in store.votes()] == ["first", "second", "tie"]


def test_undo_shows_the_pair_again_with_what_was_chosen(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann")
    client, (ann,) = client_of(store)
    assert " disabled" in client.get(ann).text.split('<form class="undo"')[1], "nothing to undo yet"
    page = choose(client, ann, verdict="second").text
    again = client.post(f"{ann}/undo", data=fields(page, "undo")).text
    assert "<b>0</b> of 5 judged" in again and "You chose Answer 2 before." in again
    assert fields(again, "vote")["position"] == "0"


def test_a_second_window_cannot_overwrite_a_verdict(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann")
    client, (ann,) = client_of(store)
    form = fields(client.get(ann).text, "vote")
    client.post(f"{ann}/vote", data={**form, "verdict": "first"})
    late = client.post(f"{ann}/vote", data={**form, "verdict": "second"})
    assert "your first verdict was kept" in late.text
    assert [vote.judgment.verdict for vote in store.votes()] == ["first"]


def test_the_time_is_what_the_page_saw_but_no_more_than_has_passed(tmp_path):
    store, clock = new_study(tmp_path / "s.sqlite", "ann"), Clock()
    client, (ann,) = client_of(store, clock)
    for told in ("", "4000", "10000"):
        form = {**fields(client.get(ann).text, "vote"), "verdict": "tie", "milliseconds": told}
        clock.now_s += 9
        client.post(f"{ann}/vote", data=form)
    assert [vote.milliseconds for vote in store.votes()] == [9000, 4000, 9000]
    assert store.votes()[0].voted_at == "2027-01-15T08:00:09.000+00:00"


def test_nothing_on_the_page_tells_the_systems_and_nothing_hostile_gets_through(tmp_path):
    answers = [Answer("1", "", f"<b>{HOSTILE}", f"{HOSTILE} {place}", f"secret-{place}") for place in "ab"]
    store = new_study(tmp_path / "s.sqlite", "<i>ann</i>", answers=answers)
    client, (ann,) = client_of(store)
    page = client.get(ann).text
    assert "secret" not in page
    assert re.findall(r"<script[^>]*>", page) == ['<script src="/page/page.js" defer>']
    for tag in ("<img", "<i>", "<b>alert", 'href="javascript', "<b><script"):
        assert tag not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_empty_answers_are_said_to_be_empty(tmp_path):
    answers = [Answer("1", "", "Say nothing.", text, system) for text, system in ((" \n", "a"), ("", "b"))]
    client, (ann,) = client_of(new_study(tmp_path / "s.sqlite", "ann", answers=answers))
    assert client.get(ann).text.count("(this answer is empty)") == 2


@pytest.mark.parametrize("path", ["/", "/a/wrong", "/a/", "/nothing", "/page/../web.py", "/page/item.html", "/docs"])
def test_without_a_token_there_is_nothing_to_see(tmp_path, path):
    store = new_study(tmp_path / "s.sqlite", "ann")
    client, (ann,) = client_of(store)
    answer = client.get(path)
    assert answer.status_code == (200 if path == "/" else 404)
    assert "What is" not in answer.text and ann not in answer.text and "ann<" not in answer.text
    assert client.post("/a/wrong/vote", data={"position": "0"}).status_code == 404


def test_every_answer_has_the_headers_that_keep_a_page_harmless(tmp_path):
    client, (ann,) = client_of(new_study(tmp_path / "s.sqlite", "ann"))
    for path in (ann, "/", "/page/style.css", "/page/shared.css", "/page/page.js", "/page/icon.svg", "/a/wrong"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script>", client.get(ann).text), "its own policy forbids it"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_post_from_another_site_is_refused(tmp_path, site):
    store = new_study(tmp_path / "s.sqlite", "ann")
    client, (ann,) = client_of(store)
    form = {**fields(client.get(ann).text, "vote"), "verdict": "first"}
    assert client.post(f"{ann}/vote", data=form, headers={"sec-fetch-site": site}).status_code == 403
    assert client.post(f"{ann}/undo", data={"vote": "1"}, headers={"sec-fetch-site": site}).status_code == 403
    assert client.get(f"{ann}/vote").status_code == 405
    assert store.votes() == []


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"position": "x"}, 400),
        ({"position": "-1"}, 400),
        ({"position": "9" * 30}, 400),
        ({"position": "77"}, 400),
        ({"verdict": "third"}, 400),
        ({"verdict": ""}, 400),
        ({"shown": ""}, 400),
        ({"milliseconds": "1e9"}, 400),
        ({f"more{n}": "x" for n in range(20)}, 400),
        ({"verdict": "x" * 5000}, 413),
    ],
)
def test_a_form_that_is_none_of_ours_is_refused_and_changes_nothing(tmp_path, changed, status):
    store = new_study(tmp_path / "s.sqlite", "ann")
    client, (ann,) = client_of(store)
    answer = choose(client, ann, **changed)
    assert answer.status_code == status
    assert ann in answer.text, "there is a way back"
    assert client.post(f"{ann}/vote", content=b"\xff\xfe").status_code == 400
    assert store.votes() == []


def test_a_full_disk_is_said_and_the_same_vote_goes_through_later(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 512) as disk:
        store = new_study(disk / "s.sqlite", "ann", answers=made_up(200, "ab"))
        client, (ann,) = client_of(store)
        ballast = fill(disk)
        status = 200
        while status == 200:
            form = {**fields(client.get(ann).text, "vote"), "verdict": "first"}
            refused = client.post(f"{ann}/vote", data=form)
            status = refused.status_code
        assert status == 507 and "This was not saved" in refused.text
        assert str(disk) not in refused.text, "where the study lies is not the annotators' business"
        assert "database or disk is full" in caplog.text
        saved = len(store.votes())
        ballast.unlink()
        assert client.post(f"{ann}/vote", data=form).status_code == 200
        assert len(store.votes()) == saved + 1
        store.close()
