"""One model through one loop: blocks, statistics, codes, packing, conversion."""
