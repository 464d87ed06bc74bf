"""The services as Ray actors: start, deadlines, routing, replacement. The only package that imports Ray."""

import os

# Ray reads these when it is imported. Its handler of SIGTERM prints a stack and ends the driver before ours has
# finished; its statistics and hub look-ups are off because nothing of a run leaves the machine unasked.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
