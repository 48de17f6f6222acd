"""Pages for people: one HTML file that loads nothing from outside. Text is escaped here and nowhere else."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from trainer.runtime.files import write_text

HYPHEN_BEFORE_NUMBER = re.compile(r"(?:(?<=^)|(?<=[\s\[(]))-(?=\.?\d)")


@dataclass(frozen=True)
class Text:
    """A paragraph. warning: set apart, for what a reader could get wrong."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Cells are text; those that begin with "!" are marked (the sign is not shown), and a hyphen before a
    number is shown as a minus. The first column and columns of words stand left, numbers right. No head: no
    heading row. words: all of it is prose, whose lines may break."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG file, which goes into the page, with its PNG beside it. alt: what it shows, for those who cannot
    see it."""

    path: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Fold:
    """Long text behind a heading that opens it, in the type of code."""

    title: str
    text: str


Part = Text | Table | Picture | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page with a list of its sections; returns its path."""
    write_text(path, page(title, lead, sections))
    return Path(path)


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    links = "".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(sections) > 2 else ""
    body = "\n".join(_section(number, section, title) for number, section in enumerate(sections))
    frame = resources.files(__package__).joinpath("page/page.html").read_text(encoding="utf-8")
    main = f"<h1>{escape(title)}</h1>\n<p class=lead>{escape(lead)}</p>\n{contents}\n{body}"
    return frame.replace("__TITLE__", escape(title)).replace("__MAIN__", main)


def _section(number: int, section: Section, title: str) -> str:
    """title: of the page, which is not said twice."""
    heading = "" if section.title == title else f"<h2>{escape(section.title)}</h2>"
    parts = "\n".join(_part(part) for part in section.parts)
    return f'<section id="s{number}">{heading}\n{parts}</section>'


def _part(part: Part) -> str:
    if isinstance(part, Text):
        return f"<p{' class=warning' if part.warning else ''}>{escape(part.text)}</p>"
    if isinstance(part, Fold):
        text = f'<pre tabindex="0">{escape(part.text)}</pre>'
        return f"<details><summary>{escape(part.title)}</summary>{text}</details>"
    if isinstance(part, Picture):
        return _picture(part)
    return _table(part)


def _picture(picture: Picture) -> str:
    svg = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/svg+xml;base64,{svg}" alt="{escape(picture.alt)}">'
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure>{image}{caption}</figure>"


def _table(table: Table) -> str:
    width = len(table.head) or len(table.rows[0])
    left = [_holds_words([row[column] for row in table.rows]) for column in range(width)]
    head = "".join(
        f'<th scope="col"{" class=left" if is_left else ""}>{escape(name)}</th>'
        for name, is_left in zip(table.head, left, strict=False)
    )
    head = f"<thead><tr>{head}</tr></thead>" if table.head else ""
    rows = "".join(f"<tr>{''.join(map(_cell, row, left))}</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    kind = " class=words" if table.words else ""
    inner = f"<table{kind}>{caption}{head}<tbody>{rows}</tbody></table>"
    return f'<div class=scroll tabindex="0" role=region aria-label="Table">{inner}</div>'


def _holds_words(cells: Sequence[str]) -> bool:
    written = [cell for cell in cells if cell]
    return bool(written) and all(cell.lstrip("!")[:1].isalpha() for cell in written)


def _cell(text: str, is_left: bool) -> str:
    marked = text.startswith("!")
    kinds = " ".join(kind for kind, holds in (("marked", marked), ("left", is_left)) if holds)
    attribute = f' class="{kinds}"' if kinds else ""
    shown = HYPHEN_BEFORE_NUMBER.sub("−", text[1:] if marked else text)
    return f"<td{attribute}>{escape(shown)}</td>"
