"""What a tile that is not ideal does: converters, noise, devices and pulses, under aihwkit's names."""
