"""Out-of-memory errors, on the host or a device: detection and one message with the settings that help."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxcoder.errors import JaxcoderError
from jaxcoder.formatting import format_bytes
from jaxcoder.io.os_errors import is_disk_full

if TYPE_CHECKING:
    from jaxcoder.config import RunConfig


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    # By name, without importing JAX.
    if type(error).__name__ not in ("XlaRuntimeError", "JaxRuntimeError") or is_disk_full(error):
        return False
    return re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE) is not None


def explain_out_of_memory(error: BaseException, config: "RunConfig | None") -> JaxcoderError:
    """One message with the settings that help, and their values if `config` is given."""
    requested = re.search(r"[\d.]+ ?[KMGT]i?B|(\d{4,}) bytes", str(error))
    size = requested and (format_bytes(int(requested[1])) if requested[1] else requested[0])
    where = "the host" if isinstance(error, MemoryError) else "the devices"
    start = f"out of memory on {where}{f' (an allocation of {size} failed)' if size else ''}"
    if config is None:
        return JaxcoderError(f"{start}. Lower the batch or the length, or use a smaller model or a larger machine.")
    microbatch = "None, the whole global batch" if config.microbatch_size is None else config.microbatch_size
    remat = {"none": '"minimal" or "block" save less', "block": "it saves least"}
    remat |= dict.fromkeys(("minimal", "offload"), '"block" saves less')
    settings = [
        f"microbatch_size (now {microbatch}): a smaller divisor of global_batch_size; the result stays the same",
        f'compute.remat (now "{config.compute.remat}"): {remat[config.compute.remat]}; the result stays the same',
        f"mesh (now {config.mesh}): more devices; the result stays the same",
        f"global_batch_size (now {config.global_batch_size}): smaller",
        f"model.max_seq_len (now {config.model.max_seq_len}): shorter",
    ]
    return JaxcoderError(
        start + ". Change one of these, the cheapest first:" + "".join(f"\n  - {setting}" for setting in settings)
    )


@contextmanager
def out_of_memory_explained(config: "RunConfig") -> Iterator[None]:
    """Replaces out-of-memory errors in the block by the one of `explain_out_of_memory`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, config) from error
