"""One thread per test process: two processes share two cores better than four threads do."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not any("gpu" in argument for argument in sys.argv):
    # read when triton is first imported, by whatever test comes first
    os.environ.setdefault("TRITON_INTERPRET", "1")
