"""The command lines: each module has a `main`, which `amp NAME` and a script of launchers/ or tools/ call alike."""

import os

# Before anything loads torch's OpenMP, which reads it then: a thread that spins while it waits for the others takes the
# core from a decoding worker, or from another process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
