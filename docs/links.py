"""Name files outside docs/ instead of linking to them, when `make docs` builds the site, which does not hold them."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Return the page, in which `[text](../FILE)` has become `text (FILE in the repository)`.

    Raises:
        FileNotFoundError: A link leads to no file, so the build fails.
    """

    def replaced(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri}: {match[2]} leads to no file. Correct the link.")
        return f"{match[1]} (`{target}` in the repository)"

    return LINK.sub(replaced, markdown)
