"""`python -m rapa_dist` is `rapa-dist`."""

from rapa_dist.cli import main

if __name__ == "__main__":
    main()
