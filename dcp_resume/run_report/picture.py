"""A picture of the page, by a browser of this machine: no library draws it a second time."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from dcp_resume.errors import ConfigurationError

__all__ = ["find_browser", "write_png"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge")
_WIDTH = 1080
_LIMIT_S = 120.0
_MEASURE = "<script>document.title=document.documentElement.scrollHeight</script>"


def find_browser() -> str:
    """The program of a Chromium or one of its kin.

    Raises:
        ConfigurationError: There is none on ``PATH``.
    """
    for name in _NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    raise ConfigurationError(
        f"a PNG needs a browser, expected one of {', '.join(_NAMES)} on PATH, found none. Install "
        "one, or leave --png away: the HTML file needs nothing.",
        option="png",
    )


def write_png(browser: str, page: str, path: Path) -> None:
    """Draw the whole page.

    Args:
        browser: Its program.
        page: The HTML.
        path: Of the picture.

    Raises:
        ConfigurationError: The browser drew nothing; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "page.html")
        # Only this copy may run a script, the one line that measures it.
        measured = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page, count=1)
        file.write_text(measured.replace("</body>", _MEASURE + "</body>"), encoding="utf-8")
        said = _browse(browser, directory, file, "--dump-dom", height=800)
        height = re.search(r"<title>(\d+)</title>", said)
        file.write_text(page, encoding="utf-8")
        tall = int(height[1]) if height else 2400
        said = _browse(browser, directory, file, f"--screenshot={path.resolve()}", height=tall)
    if not path.exists():
        raise ConfigurationError(f"{browser} wrote no {path}: {said[-400:]}", option="png")


def _browse(browser: str, directory: str, file: Path, action: str, height: int) -> str:
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={directory}/profile",
        f"--window-size={_WIDTH},{height}",
        action,
        file.as_uri(),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(
            f"{browser} did not draw the page within {_LIMIT_S:.0f} s", option="png"
        ) from error
    return done.stdout + done.stderr if action != "--dump-dom" else done.stdout
