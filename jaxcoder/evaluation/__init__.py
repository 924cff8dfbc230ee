"""Tasks that models are measured by, and their scores."""
