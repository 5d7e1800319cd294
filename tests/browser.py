"""A page in a real browser: what it looks like, what it asks for and what it complains about."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from waiting import SECONDS

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PICTURES = Path(__file__).parent.parent / "build" / "pictures"
"""Where pictures of pages are kept to be looked at."""


def check_page(page: Path, name: str, width: int, dark: bool, profile: Path) -> str:
    """Show a page as a reader with this width and colour scheme sees it; returns what the browser made of it.

    Nothing may be said on its console, where it would also tell of a request, as the page's own
    Content-Security-Policy forbids all. The picture is kept as `NAME-WIDTH.png`.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        if os.environ.get("CI"):
            pytest.fail("no browser is installed: apt-get install chromium")
        pytest.skip("no browser is installed: apt-get install chromium")
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture = PICTURES / f"{name}-{width}.png"
    picture.unlink(missing_ok=True)
    shared = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={width},2000", "--virtual-time-budget=2000",
    ]  # fmt: skip
    shot = _run(*shared, f"--screenshot={picture}", page.as_uri())
    shown = _run(*shared, "--dump-dom", page.as_uri())
    for stderr in (shot.stderr, shown.stderr):
        assert [line for line in stderr.splitlines() if "CONSOLE" in line] == []
    assert picture.stat().st_size > 20_000
    assert _brightness(picture) < 60 if dark else _brightness(picture) > 200
    return shown.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)


def _brightness(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return int(image.convert("L").resize((1, 1)).getpixel((0, 0)))
