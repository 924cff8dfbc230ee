"""What a run says about itself: metrics.jsonl (the source of truth), the terminal, TensorBoard, the loss curve."""
