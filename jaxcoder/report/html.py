"""HTML pages from one template, `page.html.jinja`: no script, no network, readable in light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """svg: inline SVG, "" leaves the chart out. legend: (name, palette index) of each line."""

    title: str
    svg: str
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Without rows the table is left out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page; its fields appear in this order, and an empty section is left out."""

    title: str = ""
    text: str = ""
    numbers: Sequence[tuple[str, str]] = ()
    """(name, value), as large numbers."""
    facts: Sequence[tuple[str, str]] = ()
    """(name, value), as a list."""
    findings: Sequence[tuple[str, str]] = ()
    """(severity, sentence)."""
    shares: Sequence[tuple[str, float, int]] = ()
    """(name, share, palette index) of a horizontal bar with its legend."""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()

    @property
    def is_empty(self) -> bool:
        has_chart = any(chart.svg for chart in self.charts)
        has_table = any(table.rows for table in self.tables)
        return not (self.text or self.numbers or self.facts or self.findings or self.shares or has_chart or has_table)


def render_page(title: str, *, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The page. All texts are escaped, except the SVG of charts."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxcoder.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.jinja")
    shown = [section for section in sections if not section.is_empty]
    return template.render(title=title, subtitle=subtitle, sections=shown, footer=footer)
