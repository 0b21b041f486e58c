"""Tests of the documentation site, as `mkdocs build --strict` makes it."""

import html.parser
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.parse

from absl.testing import absltest
from mkdocstrings import Inventory

import tf_psops

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_LOADED = {"img": "src", "link": "href", "script": "src", "source": "src"}


class _Loads(html.parser.HTMLParser):
    """Collects what a browser loads for a page."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("rel") != "canonical" and tag in _LOADED:
            self.urls.append(attrs.get(_LOADED[tag]) or "")


class SiteTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.site = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        result = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
            + [str(cls.site)],
            cwd=_ROOT,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        if result.returncode:
            raise AssertionError(result.stdout + result.stderr)

    def test_loads_nothing_from_elsewhere(self):
        pages = list(self.site.rglob("*.html"))
        self.assertNotEmpty(pages)
        for page in pages:
            loads = _Loads()
            loads.feed(page.read_text(encoding="utf-8"))
            self.assertNotEmpty(loads.urls)
            for url in loads.urls:
                parts = urllib.parse.urlsplit(url)
                self.assertEqual((parts.scheme, parts.netloc), ("", ""), page)
                folder = self.site if parts.path.startswith("/") else page.parent
                file = folder / urllib.parse.unquote(parts.path).lstrip("/")
                self.assertTrue(file.exists(), f"{page} loads {url}.")

    def test_has_all_public_names(self):
        with (self.site / "objects.inv").open("rb") as file:
            inventory = Inventory.parse_sphinx(file)
        for name in tf_psops._HOMES:
            self.assertIn(f"tf_psops.{name}", inventory)


if __name__ == "__main__":
    absltest.main()
