"""report.html: one valid, self-contained file that shows what results.json holds."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from actok.benchmark import read_results, run_benchmark, write_report
from actok.benchmark.plots import _axis, replay_figure
from actok.benchmark.report import render_report
from actok.core import ActionGroup, ActionSpace, MissingExtraError

pytest.importorskip("matplotlib")

D = 5
VOID = {"meta", "br", "hr", "img", "link", "input"}
SPACE = ActionSpace(
    embodiment="<arm> & co",
    dim=D,
    rate_hz=11.0,
    groups=(
        ActionGroup(name="tip", kind="position", dims=(0, 1, 2), unit="m", scale=0.02, mode="delta"),
        ActionGroup(name="turn", kind="joint", dims=(3,), unit="rad", scale=1.0),
        ActionGroup(name="grip", kind="gripper", dims=(4,)),
    ),
)
REPLAY = {
    "env": "point_mass",
    "horizon": 11,
    "episodes": [{"task": "reach", "index": 0}, {"task": "push", "index": 3}, {"task": "push", "index": 4}],
    "tokenizers": {
        name: {
            "success": success,
            "rate": float(np.mean(success)),
            "ci95": [max(0.0, np.mean(success) - 0.3), min(1.0, np.mean(success) + 0.3)],
            "per_task": {},
            "invalid": 0,
            "normalised_l1": l1,
            "seconds": 0.1,
        }
        for name, success, l1 in (
            ("exact", [True] * 3, 0.0),
            ("bins", [True] * 3, 0.003),
            ("coarse", [True, False, False], 0.07),
        )
    },
    "paired": [
        {"a": "exact", "b": "coarse", "both": 1, "only_a": 2, "only_b": 0, "neither": 0}
        | {"difference": 2 / 3, "ci95": [0.1, 0.9], "p_value": 0.5}
    ],
}


class Page(HTMLParser):
    """Checks that elements nest, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    rng = np.random.default_rng(0)
    episodes = [np.cumsum(rng.normal(size=(37, D)), axis=0).astype(np.float32) for _ in range(9)]
    out = tmp_path_factory.mktemp("report")
    tokenizers = ["bins", ("coarse", "bins", {"bins": 8}), ("broken", "bins", {"bins": 1})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actok.benchmark.measure.LATENCY_SECONDS", 0.02)
        run_benchmark(
            [episodes], tokenizers, out, spaces=SPACE, sweep=True, replay=REPLAY, max_fit_chunks=101, progress=False
        )
    return out


def test_the_page_is_valid_and_needs_nothing_from_outside(results):
    text = (results / "report.html").read_text()
    page = Page(text)
    assert ("meta", "name", "viewport") in page.attributes
    assert not re.search(r"https?:|<script|<link|@import|<img|<iframe", text)
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    identifiers = [value for _, key, value in page.attributes if key == "id"]
    clips = {v for v in identifiers if v.partition("-")[2].startswith("p")}
    targets = set(re.findall(r"url\(#([^)]+)\)", text)) | {v[1:] for _, k, v in page.attributes if k == "xlink:href"}
    assert clips
    assert targets <= set(identifiers)
    assert all(identifiers.count(t) == 1 for t in targets)


def test_the_page_shows_the_results(results):
    words = " ".join(Page((results / "report.html").read_text()).text)
    found = read_results(results)
    for expected in (
        "<arm> & co",
        "broken failed: bins is 1",
        "given by the caller",
        found["provenance"]["command"],
        found["datasets"][0]["identity"][:16],
        "valid steps, %",
        "tolerance on the position, mm",
        "tolerance on rotation or joints, degrees",
        "mean error, normalised units",
        "tip error of the path, p95, mm",
        "bits per chunk (fixed rate)",
        "frequency among held-out codes",
        "replay success, %",
        "exact demonstration",
        "time, s",
        "33.3 % of 3",
    ):
        assert expected in words, expected
    l1 = found["results"][0]["metrics"]["normalised"]["l1"]
    assert f"{l1:.3g}" in words


def test_numbers_on_the_axes_are_not_rounded_away(results):
    words = Page((results / "report.html").read_text()).text
    assert {"0.0001", "0.001", "0.01", "0.1"} <= {w.strip() for w in words}


def test_labels_of_reconstructions_name_unit_and_step():
    groups = (
        ActionGroup(name="tip", kind="position", dims=(0,), mode="delta", unit="m", scale=0.02),
        ActionGroup(name="arm", kind="joint", dims=(1,), unit="rad", scale=1.0),
        ActionGroup(name="odd", kind="raw", dims=(2,), mode="delta"),
    )
    space = ActionSpace(embodiment="e", dim=3, groups=groups, names=("x", "kRightShoulderPitch", "y"))
    assert [_axis(space, d)[0] for d in range(3)] == ["x, mm/step", "kRightShoulderPitch\ndeg", "y, raw/step"]
    assert _axis(space, 0)[1] == 20.0


def test_a_narrow_logarithmic_axis_has_several_numbers():
    replay = {
        "tokenizers": {
            name: {"rate": 0.9, "ci95": [0.8, 0.95], "normalised_l1": l1}
            for name, l1 in (("exact", 0.0), ("fine", 0.0028), ("coarse", 0.08))
        }
    }
    words = {w.strip() for w in Page(replay_figure(replay)).text}
    assert {"0.005", "0.01", "0.02", "0.05"} <= words


def test_every_tokenizer_is_drawn_in_its_own_way(results):
    text = (results / "report.html").read_text()
    assert "#0072b2" in text
    assert "#d55e00" in text
    assert "currentColor" in text
    assert "#010203" not in text


def test_the_page_is_the_same_every_time(results):
    found = read_results(results)
    assert render_report(found) == render_report(found) == (results / "report.html").read_text()


def test_results_without_any_success_still_make_a_page(results, tmp_path):
    found = read_results(results)
    for unit in found["results"]:
        unit.update(status="error", error="gone")
        unit.pop("metrics", None)
    found["replay"] = None
    page = Page(write_report(found, tmp_path / "report.html").read_text())
    assert "No tokenizer could be measured" in " ".join(page.text)


def test_nothing_decodable_still_makes_a_page(results, tmp_path):
    found = read_results(results)
    for unit in found["results"]:
        if unit["status"] == "ok":
            m = unit["metrics"]
            m["normalised"] = dict.fromkeys(m["normalised"], None) | {"undecodable": 1.0, "l1_by_dim": [None] * D}
            for group in m["physical"]:
                group.update(step=None, path=None)
            m["vrr"].update(position=None, angle=None)
            if "examples" in m:
                shape = np.shape(m["examples"]["reconstruction"])
                m["examples"]["reconstruction"] = np.full(shape, None).tolist()
    assert Page(write_report(found, tmp_path / "report.html").read_text()).text


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n == "matplotlib" or n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("actok.benchmark.measure.LATENCY_SECONDS", 0.02)
    data = np.random.default_rng(0).normal(size=(4, 23, D)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"report.html was not written: .*pip install 'actok\[report\]'"):
        results = run_benchmark([data], ["bins"], tmp_path, spaces=ActionSpace.raw(D), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "table.md", "table.txt", "units"]
    with pytest.raises(MissingExtraError, match="matplotlib"):
        write_report(results, tmp_path / "report.html")
