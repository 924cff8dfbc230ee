"""The tokenizer report as a matplotlib figure."""

import numpy as np

from jaxcoder.formatting import format_bytes
from jaxcoder.tokenizer.report import Measured, TokenizerReport

COLORS = ("#3366aa", "#cc6600", "#44884a", "#8855aa", "#aa3344", "#777777")
_MOST_LANGUAGES = 16


def draw_report(report: TokenizerReport):
    """A matplotlib Figure: bytes per token by language; shares of digits and whitespace; how often ids are used."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    languages = report.languages()
    shown = languages[:_MOST_LANGUAGES]
    num_bars = len(report.measured) * (len(shown) + 1)
    figure = Figure(figsize=(12, min(max(5.0, 1.6 + 0.16 * num_bars), 40.0)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    _bytes_per_token(figure.add_subplot(grid[:, 0]), report, shown, len(languages))
    _shares(figure.add_subplot(grid[0, 1]), report.measured)
    _uses(figure.add_subplot(grid[1, 1]), report.measured)
    sample = report.sample
    figure.suptitle(
        f"{format_bytes(sample.num_bytes)} of text in {sample.num_documents:,} documents, "
        f"of {format_bytes(sample.corpus_bytes)} in {sample.corpus_documents:,}",
        fontsize=10,
    )
    return figure


def _grouped_bars(axes, measured: list[Measured], rows: list[str], value, fmt: str) -> None:
    """Horizontal bars, one of each tokenizer in each row. value: from (tokenizer, number of the row) to a length."""
    height = 0.8 / len(measured)
    for number, each in enumerate(measured):
        places = np.arange(len(rows)) + (number - (len(measured) - 1) / 2) * height
        values = [value(each, row) for row in range(len(rows))]
        bars = axes.barh(places, values, height * 0.92, color=_color(number), label=_label(each))
        axes.bar_label(bars, fmt=fmt, fontsize=7, padding=2)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    _plain(axes)


def _bytes_per_token(axes, report: TokenizerReport, shown: list[str], num_languages: int) -> None:
    languages: list[str | None] = [None, *shown]
    names = ["all", *map(_escaped, shown)]
    _grouped_bars(
        axes, report.measured, names, lambda measured, row: report.bytes_per_token(measured, languages[row]), "%.2f"
    )
    axes.get_yticklabels()[0].set_fontweight("bold")
    rest = f" (the {len(shown)} largest of {num_languages} languages)" if num_languages > len(shown) else ""
    axes.set(title=f"bytes per token{rest}", xlabel="bytes of text per token (more means fewer tokens)")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8, ncols=2)


def _shares(axes, measured: list[Measured]) -> None:
    kinds = ["digits", "whitespace"]
    _grouped_bars(axes, measured, kinds, lambda each, row: 100 * each.share(kinds[row])[0], "%.1f")
    axes.set(title="tokens of only", xlabel="percent of tokens")


def _uses(axes, measured: list[Measured]) -> None:
    for number, each in enumerate(measured):
        counts = np.sort(each.counts[sorted(each.tokens)])[::-1]
        used = counts[counts > 0]
        label = f"{len(counts) - len(used):,} of {len(counts):,} unused"
        axes.plot(np.arange(1, len(used) + 1), used, color=_color(number), linewidth=1.5, label=label)
    axes.set(xscale="log", yscale="log", title="uses of each id", xlabel="ids, the most used first", ylabel="uses")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes) -> None:
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _label(measured: Measured) -> str:
    name = _escaped(measured.name)
    name = f" {name}" if name.startswith("_") else name  # matplotlib leaves names with an underscore out of legends
    exact = measured.exact_bytes / max(measured.num_bytes, 1)
    lost = "" if exact == 1 else f", changes {100 * (1 - exact):.2g} % of the text"
    return f"{name} ({measured.vocab_size:,} ids{lost})"


def _escaped(text: str) -> str:
    """matplotlib would read text between dollar signs as math."""
    return text.replace("$", r"\$")
