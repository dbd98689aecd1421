"""One thread per test process: two processes share two cores better than four threads do."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when triton is first imported, by whatever test comes first. Said either way, because processes that pytest
# starts for -n inherit it and do not see the arguments.
os.environ.setdefault("TRITON_INTERPRET", "0" if any("gpu" in argument for argument in sys.argv) else "1")
