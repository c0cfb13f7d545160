"""One thread for every test: two busy processes make OpenMP spin, and the models here are tiny."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
