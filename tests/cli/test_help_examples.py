"""The command lines that the help texts, the README and the docs show are accepted by the argument parser."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.cli.main import VERBS, Parser, parse_verb
from jaxcoder.config.overrides import apply_overrides
from jaxcoder.errors import JaxcoderError

ROOT = Path(__file__).parent.parent.parent
COMMAND = re.compile(r"(?:^|Next: |&& |\| |/)jaxcoder +(?=[\w-])")
PLACEHOLDER = re.compile(r"\.\.\.|[<\[{$]|\b[A-Z]{3,}\b")


def commands(text: str) -> list[list[str]]:
    """The words after `jaxcoder` of every command line in a text, without comments and explanations."""
    lines = re.sub(r"\\\n\s*", "", text).split("\n")
    found = []
    for i, line in enumerate(lines):
        if not (match := COMMAND.search(line.strip())):
            continue
        command = line.strip()[match.end() :]
        try:
            words = shlex.split(re.split(r" {2,}", command)[0], comments=True)
        except ValueError:  # a quoted text of several lines
            words = shlex.split("\n".join([command, *lines[i + 1 : i + 3]]).partition("\n    jaxcoder")[0])
        end = next((k for k, word in enumerate(words) if word in ("|", "&&", ">", ";")), len(words))
        found.append(words[:end])
    return found


def accepted(words: list[str]) -> bool:
    try:
        args = parse_verb(words[0], importlib.import_module(VERBS[words[0]][0]), words[1:])
        if words[0] != "launch" and getattr(args, "overrides", None):  # launch also takes variables of its file
            apply_overrides(smoke(), args.overrides)
    except SystemExit as stop:  # --help
        return stop.code == 0
    except (JaxcoderError, KeyError):
        return False
    return True


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help(verb, capsys):
    module = importlib.import_module(VERBS[verb][0])
    parser = Parser(prog=verb)
    module.add_arguments(parser)
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    examples = []
    for path in [[], *([name] for group in groups for name in group.choices)]:
        with pytest.raises(SystemExit):
            parse_verb(verb, module, [*path, "--help"])
        examples += commands(capsys.readouterr().out)
    assert examples and [words for words in examples if not accepted(words)] == []


def test_commands_of_the_docs():
    examples = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for block in [*re.findall(r"```\w*\n(.*?)```", text, re.S), *re.findall(r"(?:^ {4}.*\n)+", text, re.M)]:
            examples += [(page.name, words) for words in commands(block)]
    refused = [(page, words) for page, words in examples if not accepted(words)]
    skipped = [pair for pair in refused if PLACEHOLDER.search(" ".join(pair[1]))]
    assert len(examples) > 40 and [pair for pair in refused if pair not in skipped] == []
    assert len(skipped) == 0
