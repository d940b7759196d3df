"""The frozen model: split plans, model families, checkpoints, and the two halves of a cut model. No network."""

import logging

# Where bitsandbytes is installed, PEFT imports it, and it warns of a faster kernel that it does not find on some CPUs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
