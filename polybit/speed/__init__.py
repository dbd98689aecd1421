"""How fast: stopwatches, what is timed, llama.cpp beside it."""
