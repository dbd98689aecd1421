"""Text in: plain text, chat conversations, batches of token ids."""
