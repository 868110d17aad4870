"""The report in a real browser, headless Chromium: its numbers, its charts, its colors, and the keyboard."""

import shutil

import numpy as np
import pytest
from tiny import NAMES

from cnnjax import load_run
from cnnjax.lr_find import RangeTest
from cnnjax.report.range_test import write_range_test
from cnnjax.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"

# Returns the texts whose contrast with the background is below that of WCAG 2.2, level AA.
LOW_CONTRAST = """
() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *:not(script):not(style)")) {
    const svg = element instanceof SVGElement;
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("#confusion svg .mark-text.role-mark") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const pair = [parse(svg ? style.fill : style.color), background(svg ? element.closest("div") : element)];
    const [low, high] = pair.map(luminance).sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def paths(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    one = write_report(trained.run, folder / "one.html", data_dir=trained.data_dir)
    three = write_report(trained.runs, folder / "three.html")
    config = trained.run.run_dir / "config.json"
    other = shutil.copytree(trained.run.run_dir, folder / "other")
    (other / "SHA256SUMS").unlink(missing_ok=True)
    (other / "config.json").write_text(config.read_text().replace('"batch_size": 20', '"batch_size": 21'))
    two = write_report([trained.runs[0], load_run(other, trained.run.config)], folder / "two.html")
    power = np.arange(-140, 1) / 20
    found = RangeTest(10**power, np.interp(power, (-7, -4, -2, -1), (2.3, 2.3, 0.5, 4.0)), True)
    return {
        "one": one,
        "two": two,
        "three": three,
        "range": write_range_test(found, folder / "range/test.html", "Range <test>"),
    }


@pytest.fixture
def visit(browser, paths):
    """Returns a function that opens a page, and waits for its charts; the page must cause no message or request."""
    contexts, messages = [], []

    def open_page(name, width=1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        page.goto(paths[name].as_uri())
        count = page.locator(".chart").count()
        page.wait_for_function("n => document.querySelectorAll('.chart svg').length === n", arg=count)
        return page

    yield open_page
    for context in contexts:
        context.close()
    files = [f"file://{path}" for path in paths.values()]
    assert [x for x in messages if x not in files and not x.startswith("data:")] == []


def test_the_numbers_are_those_of_the_run(visit, trained):
    page, result = visit("one"), trained.run.result
    assert page.title().startswith("tiny-seed0")
    assert float(page.locator("#test-accuracy data").get_attribute("value")) == result["test_accuracy"]
    assert page.locator("#test-accuracy").inner_text() == f"{result['test_accuracy']:.2%}"
    rows = page.locator("#class-table tbody tr").all()
    assert len(rows) == len(NAMES) + 1
    for row, expected in zip(rows[:-1], result["classes"], strict=True):
        assert row.locator("th").inner_text() == expected["name"]
        values = [float(x.get_attribute("value")) for x in row.locator("data").all()]
        assert values == [expected[name] for name in ("count", "precision", "recall", "f1")]
    counts = page.locator("#confusion .mark-text.role-mark text").all_text_contents()
    assert sorted(map(int, counts)) == sorted(x for row in result["confusion_matrix"] for x in row if x)
    labels = page.locator("#confusion .role-axis-label").all_text_contents()
    assert all(name[:8] in label for label in labels for name in NAMES)
    page.locator("#loss summary").click()
    last = page.locator("#loss tbody tr").last.locator("td").all_inner_texts()
    assert last == [f"{trained.run.history[name][-1]:.4f}" for name in ("train_loss", "validation_loss")]
    names = page.locator(".cards bdi, table.examples bdi").all_text_contents()
    assert {*names} <= {*NAMES}
    assert page.locator("#reproduce").inner_text().startswith("cnnjax reproduce ")
    assert "--experiment" in page.locator("#reproduce").inner_text()


def test_a_group_shows_mean_and_interval_of_its_seeds(visit, trained):
    page = visit("three")
    scores = [run.test_accuracy for run in trained.runs]
    assert float(page.locator("#test-accuracy data").get_attribute("value")) == pytest.approx(sum(scores) / 3)
    cells = page.locator("#run-table tbody tr td:nth-child(2) data").all()
    assert [float(cell.get_attribute("value")) for cell in cells] == scores
    assert page.locator("#scores .mark-symbol path").count() == 3
    assert page.locator("#training-loss .mark-area path").count() == 1


def test_groups_of_one_seed_have_points_without_intervals(visit):
    page = visit("two")  # Without a warning of Vega.
    assert page.locator("#scores .mark-symbol path").count() == 2
    assert page.locator("#scores .mark-rule.role-mark").count() == 0


def test_the_plot_of_a_range_test_shows_each_loss_and_the_suggestion(visit):
    page = visit("range")
    assert page.locator("h1").inner_text() == "Range <test>"
    assert page.locator(".chart svg .mark-symbol path").count() == 141
    labels = page.locator(".chart svg .mark-text.role-mark").all_text_contents()
    page.locator("summary").click()
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator("tbody tr").all()]
    assert len(rows) == 141 and rows[80][:2] == ["1.0e-03", "1.4000"]
    lowest = min(rows, key=lambda row: float(row[2]))[0]
    suggested = float(lowest) / 10
    assert "".join(labels).replace("\n", "") == f"suggested:{suggested:g}"


def test_hovering_over_a_chart_shows_the_values_of_an_epoch(visit, trained):
    page = visit("one")
    chart = page.locator("#accuracy svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + box["height"] / 2)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    history = trained.run.history
    for name in ("train_accuracy", "validation_accuracy"):
        assert f"{history[name][-1]:.2%}" in tooltip.inner_text()


def test_a_tap_on_a_chart_shows_the_values_of_an_epoch(visit, trained):
    page = visit("one", width=360, has_touch=True, is_mobile=True)
    assert page.locator("#curves .hint").inner_text() == "Tap a chart to read its values."
    chart = page.locator("#accuracy svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 14, box["y"] + box["height"] / 2)
    page.set_default_timeout(5000)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert f"{trained.run.history['train_accuracy'][-1]:.2%}" in tooltip.inner_text()
    page.touchscreen.tap(2, box["y"])
    tooltip.wait_for(state="hidden")


def test_the_epoch_axis_has_whole_numbers(visit):
    page = visit("one")
    axis = page.locator("#loss .role-axis").filter(has_text="epoch")
    assert [*filter(None, axis.locator(".role-axis-label text").all_text_contents())] == ["1", "2", "3"]


def test_a_wheel_scrolls_the_page_and_zooms_with_ctrl(visit):
    page = visit("one")
    chart = page.locator("#loss svg")
    chart.scroll_into_view_if_needed()
    chart.hover()
    ticks, top = chart.locator(".role-axis-label").all_text_contents(), page.evaluate("scrollY")
    page.mouse.wheel(0, 100)
    page.wait_for_function("top => scrollY > top", arg=top)
    assert chart.locator(".role-axis-label").all_text_contents() == ticks
    page.evaluate("top => scrollTo({top, behavior: 'instant'})", top)
    chart.hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function(
        "ticks => [...document.querySelectorAll('#loss .role-axis-label')].map(x => x.textContent).join() !== ticks",
        arg=",".join(ticks),
    )
    assert page.evaluate("scrollY") == top


def test_the_keyboard_reaches_links_tables_and_details(visit):
    page = visit("one")
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    assert focused.inner_text() == "Skip to the content" and focused.bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator("#loss summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#loss table").is_visible()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("name", ["one", "three", "range"])
def test_a_phone_scrolls_tables_inside_their_boxes_and_the_page_only_vertically(visit, name):
    page = visit(name, width=320, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    page.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("name", ["one", "three"])
def test_light_dark_and_print_have_their_own_colors_and_enough_contrast(visit, name):
    page, colors = visit(name, color_scheme="light"), []
    for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
        page.emulate_media(media=media, color_scheme=scheme)
        line = "getComputedStyle(document.querySelector('.chart svg .mark-line path, .chart svg .mark-symbol path'))"
        colors.append(page.evaluate(f"[getComputedStyle(document.body).backgroundColor, {line}.stroke + {line}.fill]"))
        assert page.evaluate(LOW_CONTRAST) == []
    light, dark, paper = colors
    assert light[0] != dark[0] and light[1] != dark[1]
    assert paper == ["rgb(255, 255, 255)", light[1]]


@pytest.mark.parametrize("name", ["one", "three", "range"])
def test_the_structure_is_accessible(visit, name):
    page = visit(name)
    problems = page.evaluate(
        """() => {
          const all = (selector) => [...document.querySelectorAll(selector)];
          const ids = all("[id]").filter((x) => !x.closest("svg")).map((x) => x.id);
          const levels = all("h1, h2, h3, h4").map((x) => Number(x.tagName[1]));
          return {
            "no alternative": all("img:not([alt])").length,
            "no label": all('[role="img"], [role="region"], nav').filter((x) => !x.ariaLabel).length,
            "table without caption": all("table").filter((x) => !x.caption && !x.closest("#vg-tooltip-element")).length,
            "th without scope": all("th:not([scope])").length,
            "h1": all("h1").length - 1,
            "main": all("main").length - 1,
            "skipped heading": levels.filter((x, i) => i && x > levels[i - 1] + 1).length,
            "duplicate id": ids.length - new Set(ids).size,
            "broken link": all('a[href^="#"]').filter((x) => !document.getElementById(x.hash.slice(1))).length,
            "broken reference": all("[aria-labelledby]")
              .filter((x) => !document.getElementById(x.getAttribute("aria-labelledby"))).length,
            "event handler": all("*").filter((x) => x.getAttributeNames().some((n) => n.startsWith("on"))).length,
            "empty text alternative": all(".chart").filter((x) => !/\\d/.test(x.ariaLabel)).length,
            "language": document.documentElement.lang === "en" ? 0 : 1,
          };
        }"""
    )
    assert {name: count for name, count in problems.items() if count} == {}
