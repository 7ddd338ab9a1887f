"""What tiles gain: the same training steps on machines of more and more tiles, timed cycle by cycle."""
