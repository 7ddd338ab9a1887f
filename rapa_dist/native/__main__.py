"""`python -m rapa_dist.native` builds the library anew where rapa-dist is installed."""

from rapa_dist.native.build import main

main()
