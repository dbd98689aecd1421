"""What a model is worth: perplexity, token flips, tasks. An eval never sees the gold before the prediction."""
