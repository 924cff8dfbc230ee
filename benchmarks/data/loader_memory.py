"""Memory of a process that streams from a store: `python -m benchmarks.data.loader_memory STORE TOKENS SEQ_LEN`.

Prints a JSON list of {"tokens", "megabytes"}: resident memory after the first batch and at ten more points, the last
after TOKENS tokens. It runs in its own process, so that only the loader's memory is measured.
"""

import json
import sys

BATCH_SIZE = 8


def main(path: str, num_tokens: int, seq_len: int) -> None:
    from jaxcoder.config.schema import DataConfig
    from jaxcoder.data.loader import batches
    from jaxcoder.data.store import TokenStore
    from jaxcoder.data.stream import SampleStream
    from jaxcoder.record.memory import host_memory

    store = TokenStore.open(path)
    stream = SampleStream(store, store.tokenizer(), DataConfig(), seq_len=seq_len, seed=1)
    num_batches = max(num_tokens // (BATCH_SIZE * seq_len), 11)
    figures = []
    with batches(stream, global_batch_size=BATCH_SIZE, first_sample=0) as source:
        for number, _ in zip(range(num_batches), source, strict=False):
            if number == 0 or (number + 1) % (num_batches // 10) == 0:
                figures.append({"tokens": (number + 1) * BATCH_SIZE * seq_len, "megabytes": host_memory() / 1e6})
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], int(float(sys.argv[2])), int(sys.argv[3]))
