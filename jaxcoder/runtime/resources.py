"""Out of memory, on the host or a device: recognised in the errors of several libraries, explained in one message."""

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
    """Whether the host's memory or a device's ran out."""
    if isinstance(error, MemoryError):
        return True
    # By name, so that JAX need not be imported to ask.
    if type(error).__name__ not in ("XlaRuntimeError", "JaxRuntimeError") or is_disk_full(error):
        return False
    return re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE) is not None


def explain_out_of_memory(error: BaseException, config: "RunConfig | None") -> JaxcoderError:
    """One message that names the settings that help, with their present values when `config` is given."""
    asked = re.search(r"[\d.]+ ?[KMGT]i?B|(\d{4,}) bytes", str(error))
    size = asked and (format_bytes(int(asked[1])) if asked[1] else asked[0])
    what = "the host's memory" if isinstance(error, MemoryError) else "the devices' memory"
    start = f"{what} does not suffice{f' (an allocation of {size} failed)' if size else ''}"
    if config is None:
        return JaxcoderError(f"{start}. Lower the batch or the length, or use a smaller model or a larger machine.")
    whole = "None, the whole global batch at once" if config.microbatch_size is None else config.microbatch_size
    remat = {"none": '"minimal" or "block" keep less', "block": "the least already"}
    remat |= dict.fromkeys(("minimal", "offload"), '"block" keeps less')
    knobs = [
        f"microbatch_size (now {whole}): a smaller divisor of global_batch_size; the result stays the same",
        f'compute.remat (now "{config.compute.remat}"): {remat[config.compute.remat]}; the result stays the same',
        f"mesh (now {config.mesh}): more devices, so that each holds less; the result stays the same",
        f"global_batch_size (now {config.global_batch_size}): smaller",
        f"model.max_seq_len (now {config.model.max_seq_len}): shorter",
    ]
    return JaxcoderError(start + ". What helps, the cheapest first:" + "".join(f"\n  - {knob}" for knob in knobs))


@contextmanager
def out_of_memory_explained(config: "RunConfig") -> Iterator[None]:
    """Turns running out of memory inside the block into the message of `explain_out_of_memory`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, config) from error
