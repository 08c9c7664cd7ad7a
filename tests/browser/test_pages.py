"""What people see in a browser: a study's report and its pages in MLflow, with pictures in tests/browser/output."""

import pytest
from mlflow import MlflowClient
from selenium.webdriver.common.by import By

from .conftest import WIDTHS

OWN_CHARTS = ("train_loss", "valid_loss", "grad_norm", "oscillation", "spikes")

# The report


def drawn(browser):
    return browser.run("return document.body.dataset.drawn") == "yes"


@pytest.fixture
def report(browser, small):
    """Opens the report and waits until it is drawn."""

    def report(width=WIDTHS[0], **options):
        browser.open(small.report, width, **options)
        browser.wait_for(lambda: drawn(browser), "drawn report")

    return report


def figures(browser):
    """Of each figure its name, how many marks it shows, and whether it has outgrown its place."""
    return browser.run(
        """
        return [...document.querySelectorAll(".plot")].map((plot) => {
          const marks = ".scatterlayer path, .barlayer path, .heatmaplayer image, .contourlayer path, .boxlayer path";
          const shown = [...plot.querySelectorAll(marks)].filter((mark) => mark.getBoundingClientRect().width > 0);
          const place = plot.getBoundingClientRect();
          const cut = [...plot.querySelectorAll("svg text")].filter((text) => {
            const box = text.getBoundingClientRect();
            return box.width && (box.left < place.left - 1 || box.right > place.right + 1 ||
              box.top < place.top - 1 || box.bottom > place.bottom + 1);
          });
          return [plot.dataset.figure, shown.length, cut.map((text) => text.textContent)];
        })
        """
    )


def test_every_figure_is_drawn_whole_without_a_request_or_a_word_on_the_console(browser, small, report):
    report()
    for width in WIDTHS:
        browser.resize(width)
        for dark in (False, True):
            browser.media(dark=dark)
            browser.wait_for(lambda w=width: figures_as_wide_as(browser, w), "figures of that width")
            browser.wait_for(lambda d=dark: (ink_of_a_figure(browser) > 400) is d, "figures of that theme")
            browser.shoot(f"report-{width}-{'dark' if dark else 'light'}")
            found = figures(browser)
            names = {name for name, _, _ in found}
            assert {"learning-curves-valid-loss", "steps-to-target", "pairs", "pruning", "trajectories"} <= names
            assert {"landscape-sgd", "landscape-momentum", "search-history", "timeline", "stability-spikes"} <= names
            assert [name for name, marks, _ in found if marks == 0] == []
            assert [(name, cut) for name, _, cut in found if cut] == []
            assert browser.run("return document.documentElement.scrollWidth") == width
            assert cut_off(browser) == []
    assert browser.run("return document.getElementById('trouble').hidden")
    assert browser.console() == []
    assert [address for address in browser.requests() if not address.startswith(("data:", "blob:"))] == [small.report]


def figures_as_wide_as(browser, width):
    """Whether each figure has taken its place in a page of that width."""
    return browser.run(
        """
        return innerWidth === arguments[0] && [...document.querySelectorAll(".plot")].every((plot) =>
          Math.abs(plot.querySelector("svg.main-svg").getBoundingClientRect().width - plot.clientWidth) < 2);
        """,
        width,
    )


def cut_off(browser):
    """What is wider than its place, but for the table of all trials, which scrolls."""
    return browser.run(
        """
        return [...document.querySelectorAll(".scroll, pre")]
          .filter((box) => box.scrollWidth > box.clientWidth + 1 && !box.querySelector("#trials-table"))
          .map((box) => [box.innerText.slice(0, 60), box.scrollWidth, box.clientWidth]);
        """
    )


def paper_and_ink(browser):
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    return [sum(int(part) for part in colour[4:-1].split(",")) for colour in browser.run(script)]


def ink_of_a_figure(browser):
    colour = browser.run("return getComputedStyle(document.querySelector('.plot svg .xtick text')).fill")
    return sum(int(part) for part in colour[4:-1].split(","))


def test_dark_is_dark_in_page_and_figures_and_the_button_makes_it_light(browser, report):
    report(dark=True)
    paper, ink = paper_and_ink(browser)
    assert paper < 150 < 600 < ink
    assert ink_of_a_figure(browser) > 400
    browser.driver.find_element(By.ID, "theme").click()
    paper, ink = paper_and_ink(browser)
    assert ink < 150 < 600 < paper
    browser.wait_for(lambda: ink_of_a_figure(browser) < 350, "light figure")
    browser.driver.find_element(By.ID, "theme").click()


def rows(browser):
    return browser.run(
        """
        const titles = [...document.querySelectorAll("#trials-table th")].map((th) => 
          th.innerText.replace(/ [▲▼]/, ""));
        return [...document.querySelectorAll("#trials-table tbody tr")].map((row) =>
          Object.fromEntries([...row.cells].map((cell, at) => [titles[at], cell.textContent])));
        """
    )


def test_the_table_sorts_by_number_either_way(browser, report):
    report()
    (heading,) = [
        b for b in browser.driver.find_elements(By.CSS_SELECTOR, "#trials-table th button") if b.text == "learning rate"
    ]
    everything = rows(browser)
    assert len(everything) == 3 * 6 + 3 * 3  # two optimizers, the reference, and the confirmation
    rates = sorted(float(row["learning rate"]) for row in everything)
    assert [float(row["learning rate"]) for row in everything] != rates
    browser.run("arguments[0].click()", heading)
    assert [float(row["learning rate"]) for row in rows(browser)] == rates
    browser.run("arguments[0].click()", heading)
    assert [float(row["learning rate"]) for row in rows(browser)] == rates[::-1]


def test_the_table_filters_by_words_and_by_choice_together(browser, report):
    report()
    box = browser.driver.find_element(By.ID, "filter")
    box.send_keys("search sgd")
    found = rows(browser)
    assert [(row["kind"], row["optimizer"]) for row in found] == [("search", "sgd")] * 6
    assert browser.driver.find_element(By.ID, "count").text == "6 of 27 trials"
    choice = browser.driver.find_element(By.CSS_SELECTOR, ".filters select[data-column=outcome]")
    outcome = found[0]["outcome"]
    choice.find_element(By.CSS_SELECTOR, f"option[value={outcome}]").click()
    assert rows(browser) == [row for row in found if row["outcome"] == outcome]
    box.clear()
    box.send_keys("no such trial")
    assert rows(browser) == []


def test_paper_is_light_has_all_of_the_table_and_nothing_wider_than_itself(browser, report):
    report(dark=True)
    browser.resize(690)  # what A4 leaves between its margins
    browser.media(dark=True, media="print")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    browser.wait_for(lambda: ink_of_a_figure(browser) < 350, "figure for paper")
    browser.wait_for(lambda: figures_as_wide_as(browser, 690), "figures as wide as paper")
    browser.shoot("report-print")
    paper, ink = paper_and_ink(browser)
    assert ink < 150 < 600 < paper
    assert browser.run("return document.documentElement.scrollWidth") <= 690
    assert cut_off(browser) == []
    broken = "return [...document.querySelectorAll('#trials-table td')].filter((td) => td.clientHeight > 30).length"
    assert browser.run(broken) == 0  # no word or number of the table is broken into lines
    hidden = "nav, .buttons, .filters"
    assert browser.run(f"return [...document.querySelectorAll('{hidden}')].every((e) => !e.offsetParent)")
    assert browser.run(
        "const s = document.querySelector('#trials .scroll'); return s.scrollHeight <= s.clientHeight + 1"
    )
    assert [(name, cut) for name, _, cut in figures(browser) if cut] == []
    browser.run("window.dispatchEvent(new Event('afterprint'))")


# MLflow's pages


@pytest.fixture(scope="module")
def runs(small):
    """The experiment's number, the parent's id and its children."""
    client = MlflowClient(small.mlflow)
    experiment = client.get_experiment_by_name("small").experiment_id
    found = client.search_runs([experiment], max_results=100)
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 27
    return experiment, parent.info.run_id, children


def test_the_experiment_shows_the_parent_and_its_children_beneath_it(browser, small, runs):
    experiment, parent, children = runs
    browser.open(small.page("experiments", experiment, "runs"))
    cell = f"//a[contains(@href, '/runs/{parent}')]/ancestor::*[@role='gridcell']//button"
    expander = browser.wait_for(lambda: browser.driver.find_elements(By.XPATH, cell), "expander of the parent")[0]
    browser.run("arguments[0].click()", expander)
    names = [run.info.run_name for run in children]
    browser.wait_for(lambda: sum(name in browser.text() for name in names) >= 5, "children under their parent")
    browser.shoot_at_each_width("mlflow-runs")


def test_the_parent_opens_with_its_words_and_the_report(browser, small, runs):
    experiment, parent, _ = runs
    browser.open(small.page("experiments", experiment, "runs", parent))
    browser.wait_for_words("Description", "best_valid_loss")
    browser.shoot_at_each_width("mlflow-parent")
    browser.open(small.page("experiments", experiment, "runs", parent, "artifacts", "report.html"))
    frame = browser.wait_for(lambda: browser.driver.find_elements(By.TAG_NAME, "iframe"), "report in MLflow")[0]
    browser.driver.switch_to.frame(frame)
    try:
        browser.wait_for(lambda: drawn(browser), "drawn report in MLflow")
        assert browser.run("return document.querySelector('h1').innerText") == "small"
        assert [name for name, marks, _ in figures(browser) if marks == 0] == []
        assert len(rows(browser)) == 27
    finally:
        browser.driver.switch_to.default_content()
    browser.shoot_at_each_width("mlflow-report")


def test_a_child_has_a_chart_of_each_measure_by_step(browser, small, runs):
    experiment, _, children = runs
    child = next(run for run in children if run.data.tags["outcome"] == "complete")
    browser.open(small.page("experiments", experiment, "runs", child.info.run_id, "model-metrics"))
    browser.wait_for(
        lambda: len(browser.driver.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path")) >= 4,
        "charts of a child",
    )
    browser.shoot_at_each_width("mlflow-child")
    measured = child.data.metrics
    assert set(OWN_CHARTS) <= set(measured)


def test_runs_of_each_optimizer_are_compared_at_once(browser, small, runs):
    experiment, _, children = runs
    chosen = {run.data.tags["optimizer"]: run for run in children if run.data.tags["outcome"] == "complete"}
    assert set(chosen) == {"sgd", "momentum", "momentum_0.9"}
    ids = [run.info.run_id for run in chosen.values()]
    browser.open(small.page("compare-runs", runs=ids, experiments=[experiment]))
    browser.wait_for_words("Comparing 3 Runs from 1 Experiment", "learning_rate", "best_valid_loss", *chosen)
    browser.wait_for(
        lambda: browser.driver.find_elements(By.CSS_SELECTOR, ".js-plotly-plot svg"), "parallel coordinates"
    )
    browser.shoot_at_each_width("mlflow-compare")
