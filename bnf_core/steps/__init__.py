"""From rows to optimizer steps: batches, references, schedules, the loop, metrics."""
