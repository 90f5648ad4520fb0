"""The commands. Each module has a `main`, called by `amp NAME` and by the script in launchers/ or tools/."""

import os

# Set before torch loads OpenMP, which reads the variable only once. Threads that spin while they wait would take cores
# from decoding workers and other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
