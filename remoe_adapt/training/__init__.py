"""Training a family: one function per equation (`objective`), text to batches (`data`), the Trainer (`trainer`)."""
