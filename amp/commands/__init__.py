"""The command lines: each module has a `main`, which `amp NAME` and a script of launchers/ or tools/ call alike."""
