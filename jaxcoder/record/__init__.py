"""The records of a run, metrics.jsonl, events.jsonl and console output, and their readers."""
