"""The few operations that cost time: a public operator, its slow twin, and fast versions."""
