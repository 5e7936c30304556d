"""What holds for every test. Nothing here may import torch or numpy above the
environment block: their thread pools read these variables once, on import."""

import os

# One thread each: on a busy machine spinning threads make small steps tens of
# times slower. Notebook kernels started by the tests inherit this.
for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
    os.environ[f"{name}_NUM_THREADS"] = "1"
# No test reaches a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import threading  # noqa: E402

from hypothesis import HealthCheck, settings  # noqa: E402
from tqdm import tqdm  # noqa: E402

# Tests kill processes that they forked. tqdm's own lock is shared with those, and one
# that died while holding it would leave this process waiting for ever.
tqdm.set_lock(threading.RLock())

# `HYPOTHESIS_PROFILE=thorough make test` searches for longer.
_common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", max_examples=25, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
