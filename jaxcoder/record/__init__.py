"""What a run writes about itself: metrics.jsonl (the source of truth), events.jsonl, the console; and its readers."""
