"""Each request at its own precision: an engine over resident planes, and the HTTP server around it."""
