"""The words and the arithmetic everybody shares (torch only)."""
