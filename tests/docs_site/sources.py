"""The sources of the site: pages with links that hold there, files that they show, and the configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from tests.docs_site.reference import PAGES

__all__ = ["navigation", "pages", "write_sources"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DEPLOY = ROOT / "deploy" / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
# A key or a command is not broken in the middle of a word; a wide table scrolls.
_STYLE = ".md-typeset table td:first-child code { white-space: nowrap; }\n"
_SHOWN = {".png", ".yaml", ".toml"}


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def deploy_pages() -> dict[str, str]:
    """Return the sections of deploy/README.md as pages, by path; what is before them is the first."""
    text = DEPLOY.read_text(encoding="utf-8")
    start, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    found = {"deploy/index.md": start}
    for section in sections:
        title = section.partition("\n")[0]
        found[f"deploy/{anchor(title)}.md"] = f"# {section}".replace("\n### ", "\n## ")
    return found


@cache
def _deploy_anchors() -> dict[str, str]:
    """Return the link for each anchor of deploy/README.md."""
    found = {"": "deploy/index.md"}
    for path, text in deploy_pages().items():
        for level, heading in re.findall(r"^(#+) (.+)$", _FENCE.sub("", text), re.MULTILINE):
            found[anchor(heading)] = path if level == "#" else f"{path}#{anchor(heading)}"
    return found


@cache
def pages() -> dict[str, tuple[Path, str]]:
    """Return the pages by path: where each came from, and its text before links are changed."""
    found = {
        str(path.relative_to(DOCS)): (path, path.read_text(encoding="utf-8")) for path in sorted(DOCS.rglob("*.md"))
    }
    found["changelog.md"] = (CHANGELOG, CHANGELOG.read_text(encoding="utf-8"))
    found |= {path: (DEPLOY, text) for path, text in deploy_pages().items()}
    return found | {path: (DOCS / path, make()) for path, (_, make) in PAGES.items()}


def navigation() -> list[dict[str, Any]]:
    """Return the navigation: the sections of docs/index.md, with the generated pages in "Reference"."""
    found: list[dict[str, Any]] = [{"Home": "index.md"}]
    for section in re.split(r"^## ", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, rest = section.partition("\n")
        entries: list[dict[str, Any]] = []
        for _, text, link in _LINK.findall(rest):
            if (DOCS / link).resolve() == DEPLOY:
                entries.append({text: [{_title(page): path} for path, page in deploy_pages().items()]})
            elif re.match(r"^- ", rest[: rest.index(f"]({link})")].splitlines()[-1]):
                entries.append({text: "changelog.md" if (DOCS / link).resolve() == CHANGELOG else link})
        if title == "Reference":
            entries += [{name: path} for path, (name, _) in PAGES.items()]
        found.append({title: entries})
    return found


def _title(page: str) -> str:
    return page.splitlines()[0].removeprefix("# ")


def write_sources(root: Path) -> None:
    """Write all that the generator reads into an empty directory."""
    target = root / "docs"
    deploy = _deploy_anchors()
    for path, (source, text) in pages().items():
        page = target / path
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            _outside_code(text, lambda match, s=source, p=path: _link(match, s, p, deploy, target)), encoding="utf-8"
        )
    (target / "site.css").write_text(_STYLE, encoding="utf-8")
    (root / "zensical.toml").write_text(_configuration(), encoding="utf-8")


def _outside_code(text: str, replace: Any) -> str:
    """Return a page with its links replaced, except in code blocks."""
    parts = re.split(f"({_FENCE.pattern})", text, flags=_FENCE.flags)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


def _link(match: re.Match[str], source: Path, path: str, deploy: dict[str, str], target: Path) -> str:
    """Return a link as it must be in the site; the text alone where it leads to what the site does not have."""
    image, text, link = match.groups()
    if re.match(r"[a-z]+:", link):
        return match[0]
    file, _, fragment = link.partition("#")
    found = (source.parent / file).resolve() if file else source
    if found == DEPLOY:
        goal = deploy[fragment]
    elif found == CHANGELOG:
        goal = "changelog.md"
    elif found.is_relative_to(DOCS) and found.suffix == ".md":
        goal = str(found.relative_to(DOCS)) + (f"#{fragment}" if fragment else "")
    elif found.suffix in _SHOWN and found.is_file():
        goal = f"files/{found.name}"
        (target / "files").mkdir(exist_ok=True)
        shutil.copy(found, target / goal)
        dark = found.with_name(f"{found.stem}-dark{found.suffix}")
        if image and dark.exists():
            shutil.copy(dark, target / "files" / dark.name)
            shown = os.path.relpath("files", PurePosixPath(path).parent)
            return f"![{text}]({shown}/{found.name}#only-light)\n![{text}]({shown}/{dark.name}#only-dark)"
    else:
        return text
    relative = os.path.relpath(goal, PurePosixPath(path).parent)
    return f"{image}[{text}]({relative})"


def _configuration() -> str:
    """Return the generator's configuration: no request to another server, dark and light, search."""

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
        return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)

    schemes = [
        {
            "media": f"(prefers-color-scheme: {mode})",
            "scheme": scheme,
            "toggle": {"icon": icon, "name": f"Switch to {other}"},
        }
        for mode, scheme, icon, other in (
            ("light", "default", "lucide/sun", "dark"),
            ("dark", "slate", "lucide/moon", "light"),
        )
    ]
    features = ["navigation.sections", "navigation.footer", "search.highlight", "content.code.copy", "toc.follow"]
    return "\n".join(
        [
            "[project]",
            'site_name = "Tailspan"',
            'site_description = "Every batch job in Grafana or Jaeger, without changing the job"',
            'docs_dir = "docs"',
            'site_dir = "site"',
            'extra_css = ["site.css"]',
            f"nav = {toml(navigation())}",
            "[project.theme]",
            "font = false",
            f"features = {toml(features)}",
            f"palette = {toml(schemes)}",
            "[project.markdown_extensions.tables]",
            "[project.markdown_extensions.toc]",
            "permalink = true",
            "[project.markdown_extensions.pymdownx.superfences]",
            "[project.markdown_extensions.pymdownx.highlight]",
            "",
        ]
    )


def linked(text: str) -> Iterator[str]:
    """Yield the targets of a page's links, outside of code blocks."""
    for _, _, link in _LINK.findall(_FENCE.sub("", text)):
        yield link
