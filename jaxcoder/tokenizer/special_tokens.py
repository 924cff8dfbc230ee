"""The special tokens of StarCoder, in the order of their ids 0 to 18, and SantaCoder's spelling of them.

Ids are never hard-coded: they are looked up by these names (`Tokenizer.special_id`), because other tokenizers of the
family have other ids.

Reference: tokenizer training script of the BigCode project (bigcode-tokenizer, starcoder/train_bpe_tokenizer.py).
"""

END_OF_TEXT = "<|endoftext|>"
FIM_PREFIX = "<fim_prefix>"
FIM_MIDDLE = "<fim_middle>"
FIM_SUFFIX = "<fim_suffix>"
FIM_PAD = "<fim_pad>"
FILENAME = "<filename>"
GH_STARS = "<gh_stars>"
ISSUE_START = "<issue_start>"
ISSUE_COMMENT = "<issue_comment>"
ISSUE_CLOSED = "<issue_closed>"
JUPYTER_START = "<jupyter_start>"
JUPYTER_TEXT = "<jupyter_text>"
JUPYTER_CODE = "<jupyter_code>"
JUPYTER_OUTPUT = "<jupyter_output>"
EMPTY_OUTPUT = "<empty_output>"
COMMIT_BEFORE = "<commit_before>"
COMMIT_MSG = "<commit_msg>"
COMMIT_AFTER = "<commit_after>"
REPO_NAME = "<reponame>"

SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    FIM_PREFIX,
    FIM_MIDDLE,
    FIM_SUFFIX,
    FIM_PAD,
    FILENAME,
    GH_STARS,
    ISSUE_START,
    ISSUE_COMMENT,
    ISSUE_CLOSED,
    JUPYTER_START,
    JUPYTER_TEXT,
    JUPYTER_CODE,
    JUPYTER_OUTPUT,
    EMPTY_OUTPUT,
    COMMIT_BEFORE,
    COMMIT_MSG,
    COMMIT_AFTER,
    REPO_NAME,
)


def hyphenated(name: str) -> str:
    """SantaCoder's spelling: `<fim-prefix>` for `<fim_prefix>`."""
    return name.replace("_", "-")
