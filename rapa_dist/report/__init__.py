"""`rapa-dist report`: everything that is known about a run, on one page that needs nothing else."""
