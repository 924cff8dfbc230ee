"""Numbers, tables and names as people read them: bytes, durations, counts, plurals, the nearest spelling.

One function for each, used by every room; sizes of memory and files are in binary units (GiB) everywhere.
"""

import difflib
from collections.abc import Iterable, Sequence


def format_duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "2:05" (minutes), "3:02:05" (hours), "2 d 03 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{whole // 86400} d {whole // 3600 % 24:02} h"


def format_bytes(size: float) -> str:
    """ "812 bytes", "3.4 KiB", "1.2 GiB"."""
    if size < 1024:
        return f"{size:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def format_count(count: float) -> str:
    """ "812", "41,200", "3.41 million", "15.5 billion"."""
    for limit, word in ((1e9, "billion"), (1e6, "million")):
        if count >= limit:
            return f"{count / limit:.3g} {word}"
    return f"{count:,.0f}"


def format_amount(amount: float, unit: str) -> str:
    """ "3.4 MiB" for the unit "bytes", "1,204 files" for any other."""
    return format_bytes(amount) if unit == "bytes" else f"{amount:,.0f} {unit}"


def plural(number: int, noun: str, plural_noun: str | None = None) -> str:
    """ "1 device", "2,048 devices"; `plural_noun` where an s is not enough."""
    return f"{number:,} {noun if number == 1 else plural_noun or noun + 's'}"


def format_ranges(numbers: Sequence[int], most: int = 12) -> str:
    """ "3, 7 to 9, 20 and 4 more": ascending numbers, consecutive ones folded, at most `most` ranges."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges[:most]]
    rest = sum(last - first + 1 for first, last in ranges[most:])
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def format_names(names: Sequence[str], most: int = 5) -> str:
    """ "a, b, c and 397 more": at most `most` names."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def escape_control(text: str, keep: str = "") -> str:
    """Text from data with control characters escaped, except those in `keep`, so that it cannot change a terminal or
    add lines to a table."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The spelling among `known` that is closest to `word`, None if nothing is close (cutoff: 0 to 1, as difflib's)."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """ " (did you mean `tensor`?)", or "" if nothing is close: to put behind the word in an error."""
    found = nearest(word, known, cutoff=cutoff)
    return f" (did you mean `{found}`?)" if found else ""


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text, numbers to the right, floats with four significant digits: for a terminal and a log alike."""
    cells = [[_cell(value) for value in row] for row in rows]
    is_number = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    widths = [max(len(text) for text in (name, *(row[i] for row in cells))) for i, name in enumerate(columns)]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    aligned = (
        "  ".join(
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )
    return "\n".join(aligned)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
