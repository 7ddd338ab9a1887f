"""`rapa-dist chaos`: mischief done to a run at random moments, and whether its result is that of an undisturbed one."""
