import sysconfig
from pathlib import Path

import pytest

from jaxcoder.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def stdlib_texts() -> list[str]:
    """About 3 MB of the standard library, as real code."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = []
    for file in files[:110]:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    return texts


@pytest.fixture(scope="session")
def tokenizer(stdlib_texts):
    return train_tokenizer(stdlib_texts[:60], 2048)
