"""Which files of which language StarCoder read, and under which limits: its table of extensions, as data.

People of the BigCode project looked at files of every extension and wrote one row per (language, extension). Here a
language lists the extensions it keeps and drops, and an `ExtensionRule` only for other limits than usual.
"(none)" stands for files without an extension.

Reference: bigcode-dataset, preprocessing/visual_inspection.csv.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxcoder.errors import ConfigError
from jaxcoder.formatting import did_you_mean


@dataclass(frozen=True, kw_only=True)
class ExtensionRule:
    """Limits for the files of one extension. A file exactly at a limit is kept; None turns a filter off."""

    longest_line: int | None = 1000
    """Most characters in a line; None also turns off `mean_line`, as in the original."""
    mean_line: float = 100
    """Most characters in a line on average."""
    alphanumeric: float | None = 0.25
    """Least share of alphanumeric characters."""
    alphabetic: float | None = None
    """Least share of letters."""
    xml: bool = True
    """Drop files that start like XML."""
    near_dedup: str = ""
    """What the table notes for near-duplicate removal, where it departs."""


@dataclass(frozen=True)
class Language:
    """Extensions, separated by blanks, that are kept and dropped, and the rules that depart (extensions -> rule)."""

    kept: str
    dropped: str = ""
    departures: dict[str, ExtensionRule] = field(default_factory=dict)

    def rule(self, extension: str) -> ExtensionRule | None:
        """Limits for an extension (lower case, no dot, "" for none); None if its files are not used."""
        extension = extension or "(none)"
        if extension not in self.kept.split():
            return None
        for extensions, rule in self.departures.items():
            if extension in extensions.split():
                return rule
        return ExtensionRule()


LANGUAGES: dict[str, Language] = {
    "ada": Language("ada adb ads", departures={"ads": ExtensionRule(alphabetic=0.25)}),
    "agda": Language("agda"),
    "alloy": Language("als"),
    "antlr": Language("g4"),
    "applescript": Language("applescript scpt"),
    "assembly": Language("a51 asm nasm", departures={"asm": ExtensionRule(longest_line=None)}),
    "augeas": Language("aug", departures={"aug": ExtensionRule(alphabetic=0.25)}),
    "awk": Language("auk awk gawk mawk nawk"),
    "batchfile": Language("bat cmd"),
    "bison": Language("", dropped="bison"),
    "bluespec": Language("bsv", departures={"bsv": ExtensionRule(longest_line=None)}),
    "c": Language("c h", dropped="cats w"),
    "c++": Language("c++ cc cp cpp cxx h++ hh hpp hxx inl ipp tcc tpp"),
    "c-sharp": Language("cake cs cshtml", dropped="csx"),
    "clojure": Language("boot clj cljc cljs cljx", dropped="cl2"),
    "cmake": Language("cmake", departures={"cmake": ExtensionRule(longest_line=None)}),
    "coffeescript": Language("_coffee cjsx coffee cson iced"),
    "common-lisp": Language("asd lisp lsp ny", dropped="sexp"),
    "css": Language("css"),
    "cuda": Language("cu cuh"),
    "dart": Language("dart"),
    "dockerfile": Language("1 3 dockerfile mustache (none)"),
    "elixir": Language("ex exs"),
    "elm": Language("elm"),
    "emacs-lisp": Language("el emacs"),
    "erlang": Language("erl escript hrl yrl", dropped="xrl"),
    "f-sharp": Language("fs fsi fsx"),
    "fortran": Language("f f03 f08 f90 f95 for fpp", dropped="f77"),
    "glsl": Language(
        "fp frag fsh fshader geom glsl glslv shader vert vsh vshader",
        dropped="frg geo vrx",
        departures={"fp": ExtensionRule(alphabetic=0.25), "fsh": ExtensionRule(longest_line=500)},
    ),
    "go": Language("go"),
    "groovy": Language("groovy gtpl gvy", dropped="grt"),
    "haskell": Language("hs hsc"),
    "html": Language("htm html xht xhtml"),
    "idris": Language("idr lidr"),
    "isabelle": Language("thy"),
    "java": Language("java"),
    "java-server-pages": Language("jsp"),
    "javascript": Language("es6 js jsm pac sjs xsjslib"),
    "json": Language("json", departures={"json": ExtensionRule(longest_line=None, alphabetic=0.5)}),
    "julia": Language("jl"),
    "kotlin": Language("kt kts"),
    "lean": Language("hlean lean"),
    "literate-agda": Language("lagda"),
    "literate-coffeescript": Language("litcoffee"),
    "literate-haskell": Language("lhs"),
    "lua": Language("lua nse wlua"),
    "makefile": Language("cmake mak mk txt (none)"),
    "maple": Language("mpl", departures={"mpl": ExtensionRule(alphabetic=0.25)}),
    "markdown": Language(
        "markdown md mkd mkdn ron",
        departures={"markdown md mkd mkdn ron": ExtensionRule(longest_line=None)},
    ),
    "mathematica": Language(
        "ma mathematica mt nb wl",
        dropped="cdf nbp wlt",
        departures={
            "ma": ExtensionRule(longest_line=None, alphanumeric=None, alphabetic=0.25),
            "nb": ExtensionRule(longest_line=None, alphanumeric=None, alphabetic=0.25, near_dedup="3-gram at 0.7"),
            "wl": ExtensionRule(alphabetic=0.25),
        },
    ),
    "matlab": Language("matlab", departures={"matlab": ExtensionRule(longest_line=None, alphabetic=0.25)}),
    "ocaml": Language("eliom eliomi ml ml4 mli mll mly"),
    "pascal": Language("dfm lpr pas", dropped="dpr", departures={"dfm": ExtensionRule(near_dedup="skip")}),
    "perl": Language("perl pl pm psgi t", dropped="al ph plx"),
    "php": Language("ctp php phpt"),
    "powershell": Language("ps1 psd1 psm1"),
    "prolog": Language("prolog yap"),
    "protocol-buffer": Language("proto"),
    "python": Language("bzl gyp py pyde pyw"),
    "r": Language("r rd rsx", departures={"r": ExtensionRule(longest_line=None)}),
    "racket": Language("scrbl", dropped="rkt rktd rktl"),
    "restructuredtext": Language("rst", dropped="rest", departures={"rst": ExtensionRule(longest_line=None)}),
    "rmarkdown": Language("rmd", departures={"rmd": ExtensionRule(longest_line=None)}),
    "ruby": Language("builder gemspec jbuilder podspec rabl rake rb rbw ru ruby thor"),
    "rust": Language("rs"),
    "sas": Language("sas", departures={"sas": ExtensionRule(alphanumeric=None, near_dedup="5-gram at 0.6")}),
    "scala": Language("sbt scala"),
    "scheme": Language("scm sld sps", departures={"scm sld sps": ExtensionRule(alphabetic=0.25)}),
    "shell": Language("bash bats command ksh sh tmux tool zsh"),
    "smalltalk": Language("st"),
    "solidity": Language("sol"),
    "sparql": Language("rq sparql"),
    "sql": Language(
        "cql db2 ddl pkb pks plb plsql prc sql udf",
        dropped="pck pls tab",
        departures={"prc": ExtensionRule(alphabetic=0.25), "sql": ExtensionRule(longest_line=None)},
    ),
    "stan": Language("stan"),
    "standard-ml": Language("fun sml", dropped="sig"),
    "stata": Language(
        "ado do doh mata matah", dropped="ihlp sthlp", departures={"ado do": ExtensionRule(longest_line=None)}
    ),
    "systemverilog": Language("sv svh vh", departures={"sv": ExtensionRule(alphabetic=0.25)}),
    "tcl": Language("adp tcl tm"),
    "tcsh": Language("csh tcsh"),
    "tex": Language(
        "bbx bib cbx dtx ins lbx mkii mkiv mkvi sty tex",
        dropped="aux ltx toc",
        departures={"bbx bib cbx dtx ins lbx mkii mkiv mkvi sty tex": ExtensionRule(longest_line=None)},
    ),
    "thrift": Language("thrift"),
    "typescript": Language("ts tsx"),
    "verilog": Language("veo"),
    "vhdl": Language("vhd vhdl vhi vho vhw", dropped="vhf vht", departures={"vhd": ExtensionRule(alphabetic=0.25)}),
    "visual-basic": Language(
        "bas frm vb vba vbhtml vbs",
        dropped="frx",
        departures={
            "bas": ExtensionRule(alphabetic=0.25),
            "frm": ExtensionRule(longest_line=None, alphanumeric=None, near_dedup="3-gram at 0.7"),
        },
    ),
    "xslt": Language("xsl xslt", departures={"xsl xslt": ExtensionRule(xml=False)}),
    "yacc": Language("y yacc", dropped="yy", departures={"y": ExtensionRule(alphabetic=0.25)}),
    "yaml": Language("yaml yml", departures={"yaml yml": ExtensionRule(alphabetic=0.5)}),
    "zig": Language("zig"),
}

_ALIASES = {"cpp": "c++", "c#": "c-sharp", "csharp": "c-sharp", "f#": "f-sharp", "py": "python", "js": "javascript"}

# The table gives these languages extensions that only make sense behind their own names: Dockerfile.1, Makefile.txt.
_KNOWN_BY_NAME = ("dockerfile", "makefile", "gnumakefile")
_ONLY_BEHIND_NAME = {"dockerfile": {"1", "3", "mustache", ""}, "makefile": {"cmake", "txt", ""}}


def resolve_languages(names: Iterable[str]) -> tuple[str, ...]:
    """The languages named, sorted; "all" is every one that is used. Raises ConfigError, with the nearest name."""
    used = [name for name, language in LANGUAGES.items() if language.kept]
    chosen = set()
    for name in names:
        name = _ALIASES.get(name.lower(), name.lower())
        if name == "all":
            chosen.update(used)
        elif name in used:
            chosen.add(name)
        else:
            raise ConfigError(
                f"There are no rules for a language {name!r}{did_you_mean(name, used)}: choose among "
                f'{", ".join(used)}, or "all".'
            )
    if not chosen:
        raise ConfigError('No language is asked for: name at least one, such as "python", or "all".')
    return tuple(sorted(chosen))


def classify(file_name: str, languages: Iterable[str]) -> tuple[str, ExtensionRule | None] | None:
    """The language of a file among `languages`, and its rule (None: the table drops the extension).

    None if the file belongs to none of them.
    """
    stem, dot, extension = file_name.lower().rpartition(".")
    if not dot:
        stem, extension = extension, ""
    by_name = next((name for name in _KNOWN_BY_NAME if stem == name), "").removeprefix("gnu")
    dropped = None
    for name in [by_name] if by_name in languages else languages:
        if extension in _ONLY_BEHIND_NAME.get(name, ()) and name != by_name:
            continue
        rule = LANGUAGES[name].rule(extension)
        if rule is not None:
            return name, rule
        if extension and extension in LANGUAGES[name].dropped.split():
            dropped = name, None
    return dropped
