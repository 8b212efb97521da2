"""The page in Chinese, Japanese and Spanish, in both renderers: titles, labels, tooltips and what the panels say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.comfy.page import browser, open_page
from tools.make_locales import LANGUAGES, SOURCES, read

ADD = """(type) => {
  window.app.graph.clear();
  const node = window.LiteGraph.createNode(type);
  node.pos = [100, 100];
  window.app.graph.add(node);
  const labels = Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.label ?? widget.name]));
  return { title: node.title, labels, outputs: node.outputs.map((output) => output.label ?? output.localized_name) };
}"""


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest, server: Any) -> Iterator[str]:
    server.post("/settings/Comfy.Locale", request.param)
    yield request.param
    server.post("/settings/Comfy.Locale", "en")


def test_nodes_and_panels_speak_the_language_of_the_page(server: Any, nodes_2: bool, language: str) -> None:
    words, errors = read(SOURCES / f"{language}.json"), []
    with browser() as chromium:
        page = open_page(chromium, server, errors, nodes_2)
        found = page.evaluate(ADD, "LoadCaptionDataset")
        assert found["title"] == words["Load Caption Dataset"]
        assert found["labels"]["resolution"] == words["resolution"]
        assert found["outputs"][0] == words["dataset"]
        page.get_by_role("button", name=words["Add images"], exact=True).wait_for()
        page.get_by_text(words["{total} images"].replace("{total}", "24")).first.wait_for()
        if nodes_2:
            page.get_by_text(words["Load Caption Dataset"], exact=True).first.wait_for()
        assert not [error for error in errors if "sdxl" in error.lower() and "404" not in error]


# What vue-i18n makes of each text of our nodes, by its path.
READ = """async (language) => {
  const say = document.getElementById("vue-app").__vue_app__.config.globalProperties.$t;
  const { nodeDefs } = (await (await fetch("/i18n")).json())[language];
  const found = {};
  const walk = (values, path) => {
    for (const [name, value] of Object.entries(values)) {
      const inner = `${path}.${name}`;
      if (typeof value === "string") found[inner] = say(inner);
      else walk(value, inner);
    }
  };
  walk(nodeDefs, "nodeDefs");
  return found;
}"""


def test_every_name_and_tooltip_reaches_the_page(server: Any, language: str) -> None:
    """Some signs mean something to vue-i18n: it must be able to read each text."""
    with browser() as chromium:
        page = open_page(chromium, server, [], nodes_2=False)
        found = page.evaluate(READ, language)
    known = set(read(SOURCES / f"{language}.json").values())
    assert len(found) > 850
    assert not {path: text for path, text in found.items() if text not in known}
