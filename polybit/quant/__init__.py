"""Float weight to codes: one file per method, each a pure function of the weight and its statistics."""
