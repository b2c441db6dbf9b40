"""What a sweep leaves for people: the table as csv, and a page that a real browser draws without a network."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from sweeps_for_tests import CLIP, DROPOUT, EPOCHS, LR, OPTIMIZER, sweep_under_way, write_sweep

from raytrain.storage.storage import open_storage
from raytrain.sweep.report import sweep_csv, sweep_html, write_report

CHARTS = ("curves", "parallel", "map", "clip", "cost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group") / "sweep"
    write_report(open_storage(str(folder)), write_sweep(folder), "OPTIMIZATION:\n    LR: 0.006  # </script>\n")
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with browser.browsing() as opened:
        yield opened


@pytest.fixture
def page(chromium: browser.Browser, folder: Path) -> browser.Browser:
    chromium.resize(1280, 900)
    chromium.events.clear()
    chromium.open(folder / "sweep.html")
    return chromium


def marks(page: browser.Browser, selector: str) -> int:
    return int(page.js(f"document.querySelectorAll({selector!r}).length"))


def test_the_csv_has_a_row_for_each_trial_and_a_column_for_each_parameter(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
    assert [row["trial"] for row in rows] == [str(number) for number in range(24)]
    ends = ["epoch", "accuracy", "best_accuracy", "best_epoch", "seconds", "why", "error"]
    assert list(rows[0]) == ["trial", "state", LR, CLIP, DROPOUT, OPTIMIZER, *ends]
    assert rows[5]["state"] == "failed"
    assert rows[5]["error"].startswith("RuntimeError: <script>")
    best = max(rows, key=lambda row: float(row["best_accuracy"]))
    assert (best["state"], best["epoch"], best["seconds"]) == ("done", str(EPOCHS), "3.6")


def test_a_trial_that_has_not_begun_is_in_the_csv_with_its_parameters() -> None:
    lines = sweep_csv(sweep_under_way([{LR: 0.1}], [[]])).splitlines()
    assert lines[1] == "0,waiting,0.1,0,,,,0.0,,"


def test_the_page_is_drawn_without_an_error_and_without_a_network(page: browser.Browser, folder: Path) -> None:
    assert page.js("document.documentElement.dataset.drawn") == "true"
    assert page.complaints() == []
    asked = [address for address in page.requests() if not address.startswith("data:")]
    assert asked == [(folder / "sweep.html").as_uri()]


def test_every_chart_has_its_trials_at_a_size_that_can_be_read(page: browser.Browser) -> None:
    assert marks(page, "#curves path.line") == 24 + 1  # the cross of the failed one
    assert marks(page, "#curves .best-line") == 1
    assert marks(page, "#curves .stopped-line") > 10
    assert marks(page, "#parallel path.line") == 24
    assert marks(page, "#map circle.dot") == 24
    assert marks(page, "#clip circle.dot") == 24
    assert marks(page, "#clip-band") == 1
    assert marks(page, "#cost rect.bar") == 24
    assert marks(page, ".factor") == 4
    assert marks(page, "#trials tbody tr") == 24
    for chart in CHARTS:
        width, height = page.js(f"(b => [b.width, b.height])(document.querySelector('#{chart} svg').getBBox())")
        assert width > 450, chart
        assert height > 150, chart
    assert page.js("document.querySelector('#parallel svg').textContent").count("GRAD_NORM_CLIP") == 1
    assert page.js("document.getElementById('map-title').textContent") == "Map of accuracy over LR and GRAD_NORM_CLIP"
    assert "try GRAD_NORM_CLIP from" in page.js("document.getElementById('advice').textContent")


def test_what_a_config_or_an_error_says_is_never_markup(page: browser.Browser, folder: Path) -> None:
    assert "sweep" in page.js("document.title")
    assert "<script>document.title='broken'</script> &" in page.js("document.querySelector('td.error').textContent")
    assert page.js("document.getElementById('best').textContent") == "OPTIMIZATION:\n    LR: 0.006  # </script>\n"
    assert (folder / "sweep.html").read_text().count("</script>") == 2  # the data's own and the script's


def test_a_trial_that_is_pointed_at_is_shown_in_every_chart_with_its_parameters(page: browser.Browser) -> None:
    x, y = page.js(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        "([...document.querySelectorAll('#curves circle.dot')].at(-1).getBoundingClientRect())"
    )
    page.point_at(x, y)
    tip = page.js("document.getElementById('tip').innerText")
    best = page.js("data.best")
    assert tip.startswith(f"trial {best}, the best")
    assert all(name in tip for name in ("LR", "GRAD_NORM_CLIP", "DROPOUT", "OPTIMIZER", "best accuracy", "epoch 9/9"))
    for chart in (*CHARTS, "trials"):
        assert marks(page, f"#{chart} .hot[data-trial='{best}']") > 0, chart
    page.point_at(3, 3)
    assert page.js("document.getElementById('tip').hidden")


def test_the_table_is_sorted_by_the_title_that_is_clicked(page: browser.Browser) -> None:
    def column(index: int) -> list[str]:
        cells = f"[...document.querySelectorAll('#trials tbody tr')].map(r => r.children[{index}].textContent)"
        return list(page.js(cells))

    assert column(0)[0] == str(page.js("data.best"))
    page.js("document.querySelectorAll('#trials th button')[2].click()")
    rates = list(map(float, column(2)))
    assert rates == sorted(rates)
    page.js("document.querySelectorAll('#trials th button')[2].click()")
    assert list(map(float, column(2))) == sorted(rates, reverse=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_phone_scrolls_only_downwards_and_both_schemes_can_be_read(
    page: browser.Browser, width: int, scheme: str
) -> None:
    page.resize(width, 844, scheme)
    page.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.js("document.documentElement.scrollWidth") == width
    assert page.js("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().right <= innerWidth)")
    ink, ground = page.js("[variable('--ink'), variable('--card')].map(c => parseInt(c.slice(1, 3), 16))")
    assert abs(ink - ground) > 150
    assert (ground < ink) == (scheme == "dark")
    assert page.complaints() == []


def test_a_clone_is_marked_in_its_curve(chromium: browser.Browser, tmp_path: Path) -> None:
    view = sweep_under_way([{LR: 0.1}, {LR: 0.2}], [[0.5, 0.6], [0.3, 0.2]])
    view.add({"kind": "clone", "time": 3.0, "trial": 1, "epoch": 2, "from": 0, "params": {LR: 0.12}})
    (tmp_path / "sweep.html").write_text(sweep_html(view))
    chromium.open(tmp_path / "sweep.html")
    assert marks(chromium, "#curves circle[data-trial='1']") == marks(chromium, "#curves circle[data-trial='0']") + 1


@pytest.mark.parametrize(
    "trials", ["none", "waiting", "one", "nan", "one value each", "named", "nearly one value", "out of reach"]
)
def test_a_sweep_with_little_to_show_is_drawn_too(chromium: browser.Browser, tmp_path: Path, trials: str) -> None:
    view = {
        "none": sweep_under_way([], []),
        "waiting": sweep_under_way([{LR: 0.1, CLIP: 1.0}], [[]]),
        "one": sweep_under_way([{LR: 0.1, CLIP: 1.0}], [[0.5]]),
        "nan": sweep_under_way([{LR: 0.1, CLIP: 1.0}] * 2, [[None], [None, None]]),
        "one value each": sweep_under_way([{LR: 0.1, CLIP: None}, {LR: 0.1, CLIP: 3.0}], [[0.5, 0.5], [0.5]]),
        "nearly one value": sweep_under_way(
            [{LR: 1.0, CLIP: 1.0}, {LR: 1 + 2**-52, CLIP: 3.0}], [[0.5], [0.5 + 2**-53]]
        ),
        "out of reach": sweep_under_way(
            [{LR: 10**400, CLIP: -1.7e308}, {LR: 1, CLIP: 1.7e308}], [[1.7e308], [-1.7e308]]
        ),
        "named": sweep_under_way([{"MODEL.NAME": name} for name in ("a", "<b>")], [[0.1], [0.2]], mode="min"),
    }[trials]
    (tmp_path / "sweep.html").write_text(sweep_html(view))
    chromium.events.clear()
    chromium.open(tmp_path / "sweep.html")
    assert chromium.js("document.documentElement.dataset.drawn") == "true"
    assert chromium.complaints() == []
    assert "NaN" not in chromium.js("document.body.innerHTML").partition('type="application/json"')[0]


def test_a_thousand_trials_of_150_epochs_are_drawn(chromium: browser.Browser, tmp_path: Path) -> None:
    params = [{LR: 10 ** (-4 + n / 250), CLIP: 1.0 + n % 7} for n in range(1000)]
    view = sweep_under_way(
        params, [[1.5 + n % 13 + 10 / epoch for epoch in range(1, 151)] for n in range(1000)], mode="min"
    )
    write_report(open_storage(str(tmp_path)), view)
    chromium.events.clear()
    chromium.open(tmp_path / "sweep.html")
    assert chromium.complaints() == []
    assert chromium.js("document.documentElement.dataset.drawn") == "true"
    assert marks(chromium, "#curves path.line") == 1000
