"""One file per task: how a sample becomes a conversation, and how a prediction is scored."""
