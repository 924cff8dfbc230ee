"""Hostile text and documents for the tests of the data room."""

import random

from jaxcoder.io.document import Document, Part

HOSTILE = (
    " ", "  ", "    ", " " * 17, "\t", "\t\t\t", "\n", "\n\n\n", "\r\n", "\r", "\f", "\v", " \n\t ", "\x00", "\x7f",
    "x", "1", "12 34", "a1b2", "'s", "don't we'll", " .", " ?", " !", " ,", " n't", " ' ",
    "def f(x):\n    return x + 1\n", "for i in range(10):\r\n\tprint(i)\r\n", "if __name__ == '__main__':",
    "{}[]();;==",
    "e\u0301o\u0308", "\u0301", "\u093f\u0939", "中文代码", "日本語のコメント", "한국어", "العربية", "русский",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd",
    "\ue000", "\uf8ff", "\U000f0000", "\uffff", "\u0378", "\ufffd", "\u00a0", "\u3000", "\u2028", "\x85",
    "\x1c", "\ufeff",
    "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<|endoftext|>", "<filename>", "<fim-prefix>", "<file",
    "name>",
)  # fmt: skip
SPECIALS = ("<filename>", "<reponame>", "<jupyter_code>", "<commit_before>", "<empty_output>")


def hostile_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choice(HOSTILE) for _ in range(rng.randint(0, most)))


def hostile_document(rng: random.Random) -> Document:
    parts = []
    for _ in range(rng.randint(0, 4)):
        parts.append(Part(special=rng.choice(SPECIALS)) if rng.random() < 0.4 else Part(hostile_text(rng)))
    return Document(tuple(parts), repo_name=f"repo{rng.randint(0, 9)}", path=f"file{rng.random()}.py", lang="python")


def hostile_documents(count: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    return [hostile_document(rng) for _ in range(count)]
