"""`python -m ramp_moe.cli`"""

from . import main

main(prog_name="ramp-moe")
